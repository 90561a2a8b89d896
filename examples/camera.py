"""What does batch norm cost in a camera's latency, and what is left of it after folding?
======================================================================================

A car that looks at the road has to answer frame by frame, and in inference batch norm is nothing but a
scale and a shift per channel with fixed statistics. A scale and a shift can be moved into the convolution
in front: `nbnorm.fold_batch_norm` returns its new weight and bias, and the normalization is gone.

Two photographs that come with scikit-learn, 427 x 640 pixels, stand for the camera. The network takes edges
and colors out of the frame by a convolution of 3 x 3 from 3 to 16 channels, with batch norm and relu. Its
running statistics are those of the first photograph; the frames come from the second one.

**What to look at.** Both networks show the same picture, up to the rounding of float32, and the folded one
takes less time: it saves the whole of the normalization, one reading and one writing of the feature maps
per frame. How much that is of the whole depends on the convolution; the one here is written in plain NumPy,
and the faster yours is, the more folding saves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
from sklearn.datasets import load_sample_images

import nbnorm
from networks import BLUE, ORANGE, Conv, panels, parse, save

CHANNELS = 16


def photographs() -> tuple[np.ndarray, np.ndarray]:
    """Two photographs as (1, 3, 427, 640), values from 0 to 1."""
    first, second = load_sample_images().images
    return tuple((image / np.float32(255)).transpose(2, 0, 1)[np.newaxis].copy() for image in (first, second))


def train_statistics(conv: Conv, bn: nbnorm.BatchNorm, x: np.ndarray) -> None:
    """Let batch norm see one photograph: its running statistics become those of that photograph."""
    bn.train()
    bn(conv(x), keep=False)
    bn.eval()


def folded(conv: Conv, bn: nbnorm.BatchNorm) -> Conv:
    """A convolution that does the work of both."""
    weight, bias = nbnorm.fold_batch_norm(conv.params["weight"], conv.params["bias"], bn)
    alone = Conv(3, CHANNELS, np.random.default_rng(0))
    alone.params["weight"][:], alone.params["bias"][:] = weight, bias
    return alone


def timed(frames: Sequence[np.ndarray], *networks: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Milliseconds of every network for every frame, in turns; shape (networks, frames)."""
    times = np.zeros((len(networks), len(frames)))
    for i, frame in enumerate(frames):
        for k, network in enumerate(networks):
            start = perf_counter()
            network(frame)
            times[k, i] = 1e3 * (perf_counter() - start)
    return times


def main(argv: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Show both networks the same frames; return their times and outputs."""
    options = parse(__doc__, argv, "camera", frames=60)
    calibration, photo = photographs()
    rng = np.random.default_rng(0)
    conv, bn = Conv(3, CHANNELS, rng), nbnorm.BatchNorm(CHANNELS, momentum=1.0)
    bn.weight, bn.bias = rng.uniform(0.5, 1.5, CHANNELS), rng.normal(0, 0.3, CHANNELS)
    train_statistics(conv, bn, calibration)
    alone = folded(conv, bn)

    def with_norm(frame: np.ndarray) -> np.ndarray:
        y = conv(frame)
        return np.maximum(bn(y, keep=False), 0)

    def without(frame: np.ndarray) -> np.ndarray:
        return np.maximum(alone(frame), 0)

    y, y_folded = with_norm(photo), without(photo)
    frames = [np.roll(photo, 8 * i, axis=-1) for i in range(options.frames)]  # the car turns
    times = timed(frames, with_norm, without)
    difference = np.abs(y - y_folded).max()
    print(f"largest difference of the feature maps: {difference:.1e} (values up to {y.max():.1f})")
    for name, ms in zip(("convolution, batch norm", "folded convolution"), times, strict=True):
        median, worst = np.median(ms), np.percentile(ms, 95)
        rate = f"{1e3 / median:5.1f} frames per second"
        print(f"{name:24} median {median:6.1f} ms   95th percentile {worst:6.1f} ms   {rate}")
    saved = np.median(times[0]) - np.median(times[1])
    print(f"folding saves {saved:.1f} ms of {np.median(times[0]):.1f} ms per frame")

    title = "A camera frame, with batch norm and with batch norm folded in"
    figure, (frame_axes, map_axes, axes) = panels(title, 3, width=3.7, height=2.8)
    channel = int(y.std(axis=(0, 2, 3)).argmax())
    frame_axes.imshow(photo[0].transpose(1, 2, 0))
    map_axes.imshow(y_folded[0, channel], cmap="gray", vmax=np.percentile(y_folded[0, channel], 98))
    frame_axes.set_title("frame")
    map_axes.set_title(f"channel {channel} of both networks", fontsize=12)
    for panel in (frame_axes, map_axes):
        panel.axis("off")
    limit = np.percentile(times, 97)
    for ms, name, color in zip(times, ("conv + batch norm", "folded"), (ORANGE, BLUE), strict=True):
        axes.hist(ms, bins=np.linspace(0, limit, 40), color=color, alpha=0.7, label=name)
    axes.set(title="latency", xlabel="ms per frame", ylabel="frames")
    axes.legend(frameon=False, fontsize=8)
    save(figure, options.output)
    return {"times": times, "y": y, "y_folded": y_folded}


if __name__ == "__main__":
    main()
