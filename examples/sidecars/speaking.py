"""What the sidecars in this folder share: they say what they are, then answer one line for each line that they are asked.

Standard library alone, so that it runs in any environment from Python 3.8 on. The protocol is described in docs/sidecars.md.
"""

import hashlib
import json
import os
import sys
from importlib import metadata


def version(name):
    """The installed version of a library, or "absent"; nothing is imported."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def sha256(path):
    """Of a file of weights; "absent" where there is none."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for chunk in iter(lambda: file.read(2**24), b""):
                digest.update(chunk)
    except OSError:
        return "absent"
    return digest.hexdigest()


def offline(download):
    """Keep hub libraries from the network unless --download was given: weights are fetched when a user says so."""
    if not download:
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")


def _open(name, opened, fix):
    """Call `opened`, and end with one line where it fails; scripts of this folder must not hide libraries of their names."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]
    try:
        return opened()
    except ImportError as error:
        sys.exit(f"{name}: {error}. In the environment of this sidecar: {fix}")
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        sys.exit(f"{name} cannot open its model ({said}). Where its weights are missing: once with --download, or name them")


def serve(name, number, needs, opened, libraries, fix, **about):
    """Speak until the input ends.

    Args:
        name, number: of the sidecar.
        needs: keys of a request that it reads.
        opened: called before the first answer; imports what is heavy, and returns a function from a request to an answer.
        libraries: names of packages whose versions belong into the record.
        fix: the command that installs what is missing.
        about: what else belongs into the record, such as weights.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to standard error

    def say(row):
        answers.write(json.dumps(row) + "\n")
        answers.flush()

    say({"sidecar": name, "version": number, "needs": needs, "libraries": {n: version(n) for n in libraries}, **about})
    answer = None
    for line in sys.stdin:
        asked = json.loads(line)
        if answer is None:
            answer = _open(name, opened, fix)
        try:
            said = answer(asked)
        except Exception as error:  # one image must not end the others
            said = {"error": f"{type(error).__name__}: {error}"}
        say({"id": asked["id"], **said})
