"""Stage `autoencoder` of the bundled world: train an `AutoencoderKL` with SD3's latent layout (f = 8, 16 channels)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from fewstep import noise
from fewstep.engine.ema import EMA
from fewstep.engine.loop import train
from fewstep.engine.optim import Optim, Optimizer
from fewstep.engine.precision import autocast
from fewstep.worlds.shapes.data import training_images


@dataclass(frozen=True)
class Phase:
    """One stretch of training with its own weights and learning-rate schedule.

    Attributes:
        images: training images.
        lr: peak learning rate, decayed to a hundredth by a cosine.
        kl_weight: weight of the mean KL a latent element; high enough that neighbouring latents decode alike, which
            is what a flow model's small errors need (ours).
        l1_weight: weight of the absolute error beside the squared error; keeps the edges of faint shapes crisp.
    """

    images: int
    lr: float
    kl_weight: float
    l1_weight: float


@dataclass(frozen=True)
class Config:
    """How the autoencoder is trained.

    Attributes:
        phases: stretches of training, in order. The second is for small pink shapes, whose contrast is lowest: after
            the first alone, 1.8 % of scenes came back with one that could not be read.
        batch: images a step.
        channels: widths of the four resolutions, 64 px to 8 px.
        seed: of weights, scenes and posterior noise.
    """

    phases: tuple[Phase, ...] = (Phase(36_000, 2e-3, 1e-3, 0.2), Phase(16_000, 1.5e-3, 5e-4, 1.0))
    batch: int = 16
    channels: tuple[int, int, int, int] = (16, 32, 64, 64)
    seed: int = 0


def build(channels: tuple[int, ...]) -> AutoencoderKL:
    """An untrained autoencoder of SD3's layout: no quantisation convolutions, 16 latent channels, attention at 8 px."""
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def load(folder: Path) -> AutoencoderKL:
    """Open a trained autoencoder.

    Raises:
        ValueError: when there is none.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no autoencoder; stage `autoencoder` makes it: fewstep run shapes_teacher")
    return AutoencoderKL.from_pretrained(folder, local_files_only=True)


def loss(vae: AutoencoderKL, pixels: Tensor, eps: Tensor, phase: Phase) -> dict[str, Tensor]:
    """Reconstruction and KL of a batch (B, 3, H, W) with posterior noise `eps` (B, 16, H/8, W/8); scalars, fp32."""
    with autocast():
        moments = vae.encoder(pixels)
        mean, logvar = moments.float().chunk(2, dim=1)
        logvar = logvar.clamp(-12.0, 8.0)
        restored = vae.decoder(mean + (0.5 * logvar).exp() * eps).float()
    mse, mae = F.mse_loss(restored, pixels), F.l1_loss(restored, pixels)
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    return {"loss": mse + phase.l1_weight * mae + phase.kl_weight * kl, "mse": mse.detach(), "kl": kl.detach()}


def run(config: Config, work: Path, metrics: Path) -> AutoencoderKL:
    """Train and return the averaged autoencoder with `scaling_factor` and `shift_factor` measured on training scenes.

    Raises:
        ValueError: for a budget below one step.
        FloatingPointError: when the loss is not finite.
    """
    torch.manual_seed(config.seed)
    vae = build(config.channels).to(memory_format=torch.channels_last)
    for number, phase in enumerate(config.phases):
        _train_phase(vae, phase, config, number, work / f"phase-{number}", metrics)
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    with torch.no_grad():
        latents = torch.cat(
            [vae.encode(training_images(config.seed + 1, i * 64, 64)).latent_dist.mode() for i in range(16)]
        )
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    return vae


def _train_phase(vae: AutoencoderKL, phase: Phase, config: Config, number: int, work: Path, metrics: Path) -> None:
    """Train in place; on return the network holds the averaged weights."""
    optim = Optim(lr=phase.lr, betas=(0.9, 0.99), warmup_images=1600, final_lr_ratio=0.01)
    optimizer, ema = Optimizer(vae.named_parameters(), optim), EMA({"vae": vae}, 0.1 * phase.images)
    seed = config.seed + 1000 * number

    def step(seen: int) -> dict[str, float]:
        eps = noise.normal((16, 8, 8), seed=seed, index=range(seen, seen + config.batch), step=0)
        pixels = training_images(seed, seen, config.batch).contiguous(memory_format=torch.channels_last)
        parts = loss(vae, pixels, eps, phase)
        parts["loss"].backward()
        optimizer.step(seen, phase.images)
        ema.update(seen, config.batch)
        return {name: float(value.detach()) for name, value in parts.items()}

    train(
        step,
        {"vae": vae, "optimizer": optimizer, "ema": ema},
        stage=f"autoencoder-{number}",
        total_images=phase.images,
        images_per_step=config.batch,
        work=work,
        metrics=metrics,
    )
    ema.copy_to({"vae": vae})
