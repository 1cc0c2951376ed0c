from __future__ import annotations

import numpy as np
import pytest

from fewstep.evaluate import fidelity


def test_known_differences() -> None:
    black = np.zeros((3, 4, 4, 3), np.uint8)
    other = black.copy()
    other[0] += 1  # every pixel by one
    other[1] = 255
    each = fidelity.psnr(other, black)
    assert each[0] == pytest.approx(20 * np.log10(255)) and each[1] == pytest.approx(0) and each[2] == fidelity.CAP
    found = fidelity.summary(other, black)
    assert found["largest"] == 255 and found["images"] == 3
    assert found["psnr"] == pytest.approx(-10 * np.log10((1 / 255**2 + 1) / 3))
    assert found["psnr_median"] == pytest.approx(each[0])
    same = fidelity.summary(black, black)
    assert same["psnr"] == same["psnr_p5"] == fidelity.CAP and same["largest"] == 0
    with pytest.raises(ValueError, match="are compared with"):
        fidelity.psnr(black, black[:2])
