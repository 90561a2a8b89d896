"""How far are layer, RMS, group and instance norm from the speed of memory?

python -m benchmarks.bench_norms prints one table for each norm.
"""

from __future__ import annotations

from benchmarks.common import TRAINING, Case, Timed, measure, measured, show

LAYER = {
    "BERT, 8 x 512 tokens": Case("layer", (4096, 768)),
    "GPT, 8 x 1024 tokens": Case("layer", (8192, 1024)),
    "Swin, windows": Case("layer", (65536, 96)),
    "long rows": Case("layer", (128, 50257)),
}
RMS = {
    "Llama, 2048 tokens": Case("rms", (2048, 4096)),
    "Llama, one token": Case("rms", (1, 4096)),
    "small model": Case("rms", (16384, 512)),
    "heads": Case("rms", (65536, 128)),
}
GROUP = {
    "diffusion, early": Case("group", (2, 320, 64, 64), num_groups=32),
    "diffusion, late": Case("group", (2, 1280, 8, 8), num_groups=32),
    "YOLO": Case("group", (8, 64, 160, 160), num_groups=32),
    "YOLO, channels last": Case("group", (8, 64, 160, 160), True, num_groups=32),
    "3-D U-Net": Case("group", (2, 32, 64, 64, 64), num_groups=8),
}
INSTANCE = {
    "style": Case("instance", (2, 32, 256, 256)),
    "style, channels last": Case("instance", (2, 32, 256, 256), True),
    "3-D U-Net, top": Case("instance", (2, 32, 64, 64, 64)),
    "3-D U-Net, bottom": Case("instance", (2, 320, 8, 8, 8)),
}


class _Norm(Timed):
    param_names = ("operation", "case")

    def measure(self, operation, name):
        return measure(operation, self.cases[name])


class LayerNorm(_Norm):
    """Rows, as in Transformers."""

    cases = LAYER
    params = (TRAINING, list(cases))

    def setup_cache(self):
        return measured(self)


class ShortRows(Timed):
    """What does a row of layer norm cost beside its elements?"""

    params = (TRAINING, [32, 64, 96, 128, 160, 256, 512], ["256 KB", "24 MB"])
    param_names = ("operation", "columns", "size")

    def measure(self, operation, columns, size):
        values = {"256 KB": 1 << 16, "24 MB": 3 << 21}[size]
        return measure(operation, Case("layer", (values // columns, columns)))

    def setup_cache(self):
        return measured(self)


class FewRows(Timed):
    """What do rows cost that are too few for many tasks?"""

    params = (TRAINING, [(18, 5120), (25, 3072), (71, 1536), (102, 1000), (201, 384)])
    param_names = ("operation", "shape")

    def measure(self, operation, shape):
        return measure(operation, Case("layer", shape))

    def setup_cache(self):
        return measured(self)


class RMSNorm(_Norm):
    """Rows, as in large language models."""

    cases = RMS
    params = (TRAINING, list(cases))

    def setup_cache(self):
        return measured(self)


class GroupNorm(_Norm):
    """Groups of channels, as in diffusion models and detectors."""

    cases = GROUP
    params = (TRAINING, list(cases))

    def setup_cache(self):
        return measured(self)


class InstanceNorm(_Norm):
    """Channels of each sample, as in style transfer and medical images."""

    cases = INSTANCE
    params = (TRAINING, list(cases))

    def setup_cache(self):
        return measured(self)


class ShortPlanes(Timed):
    """What does a plane of instance norm, or of a channel of group norm, cost beside its elements?"""

    params = (
        TRAINING,
        ["instance", "group of 4", "group of 32"],
        [16, 25, 49, 64, 100, 196, 256, 400],
        ["1 MB", "12 MB"],
    )
    param_names = ("operation", "norm", "plane", "size")

    def measure(self, operation, norm, plane, size):
        values = {"1 MB": 1 << 18, "12 MB": 3 << 20}[size]
        name, _, channels = norm.partition(" of ")
        groups = 128 // int(channels or 1)
        return measure(operation, Case(name, (values // (128 * plane), 128, plane), num_groups=groups))

    def setup_cache(self):
        return measured(self)


if __name__ == "__main__":
    show(LayerNorm, ShortRows, FewRows, RMSNorm, GroupNorm, InstanceNorm, ShortPlanes)
