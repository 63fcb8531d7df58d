"""How fast a device can be at most, and which compute dtype suits it.

A *peak* is dense FLOP/s in one compute dtype: the denominator of MFU. For GPUs it is the vendor's published figure,
looked up by the name that `torch.cuda.get_device_name` returns; a name that is not in the table has no peak (None),
because MFU against a guess is worse than none. For a CPU, where nobody publishes one, it is measured.

    python -c "from flops_parameter_counting.hardware import *; print(peak_flops('NVIDIA H100 PCIe', 'bfloat16'))"
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Peak:
    """Dense peak of one device in one dtype: FLOP/s, where the figure comes from, and whether it was measured here."""

    flops: float
    source: str
    measured: bool = False

    def __str__(self) -> str:
        return f"{self.flops / 1e12:.4g} TFLOP/s ({self.source})"


# -------------------------------------------------------------------------------------- published peaks


@dataclass(frozen=True)
class _Device:
    """One row: `name` is a regular expression for the whole device name; peaks are dense TFLOP/s, None if not published.

    Vendors print tensor-core figures with 2:4 sparsity, which training cannot use: twice what stands here.
    fp16 and fp8 are with fp32 accumulation, as PyTorch uses them (on GeForce cards that is slower). `compared`: what the
    figures were checked against; "not verified" means that nobody has compared this row with its datasheet yet.
    """

    name: str
    source: str
    bf16: float | None = None
    fp16: float | None = None
    tf32: float | None = None
    fp32: float | None = None
    fp8: float | None = None
    compared: str = "the vendor's table as quoted elsewhere"

    @property
    def cited(self) -> str:
        """The source, with a warning where the row was never checked."""
        return self.source + (" (not verified)" if "not verified" in self.compared else "")


_GA102_WHITEPAPER = "NVIDIA Ampere GA102 GPU Architecture whitepaper v2"
_ADA_WHITEPAPER = "NVIDIA Ada GPU Architecture whitepaper, appendix A"
_H100_DATASHEET = "NVIDIA H100 Tensor Core GPU datasheet"
_H200_DATASHEET = "NVIDIA H200 Tensor Core GPU datasheet"
_V100_DATASHEET = "NVIDIA V100 Tensor Core GPU datasheet"
_BLACKWELL_DATASHEET = "NVIDIA Blackwell datasheet, individual GPU specifications"
_ULTRA_DATASHEET = "NVIDIA Blackwell Ultra datasheet"
_RTX_BLACKWELL_WHITEPAPER = "NVIDIA RTX Blackwell GPU Architecture whitepaper"
_WORKSTATION_DATASHEET = "NVIDIA {} datasheet"
_COMPUTED = "not verified: multiprocessors × boost clock × what the chip's tensor cores do a clock, as for its listed siblings"

# The whole name must match, so that a Laptop, Ti or "D" variant, a vGPU or a MIG slice is unknown rather than wrong.
# "NVIDIA", "Tesla" or "AMD" may precede every name: older drivers leave the brand out.
_DEVICES = (
    _Device(r"GB300", _ULTRA_DATASHEET, bf16=2500, fp16=2500, tf32=1250, fp32=80, fp8=5000),
    _Device(r"B300( SXM6 AC)?", _ULTRA_DATASHEET, bf16=2250, fp16=2250, tf32=1100, fp32=75, fp8=4500),
    _Device(r"GB200", _BLACKWELL_DATASHEET, bf16=2500, fp16=2500, tf32=1250, fp32=80, fp8=5000),
    _Device(r"B200", _BLACKWELL_DATASHEET, bf16=2250, fp16=2250, tf32=1100, fp32=75, fp8=4500),
    _Device(
        r"GH200 (480GB|120GB|144G HBM3e)",
        "NVIDIA GH200 Grace Hopper Superchip datasheet",
        bf16=989,
        fp16=989,
        tf32=494,
        fp32=67,
        fp8=1979,
        compared="not verified: the figures of the H100 SXM, whose GH100 chip it carries",
    ),
    _Device(r"H200", _H200_DATASHEET, bf16=989, fp16=989, tf32=494, fp32=67, fp8=1979),
    _Device(
        r"H200 NVL",
        _H200_DATASHEET,
        bf16=835,
        fp16=835,
        tf32=417,
        fp32=60,
        fp8=1670,
        compared="bf16 as quoted elsewhere; the other columns, of the H100 NVL with the same chip: not verified",
    ),
    _Device(r"H800", "NVIDIA H800 GPU datasheet (SXM)", bf16=989, fp16=989, tf32=494, fp32=67, fp8=1979),
    _Device(
        r"H800 PCIe",
        "NVIDIA H800 GPU datasheet (PCIe)",
        bf16=756,
        fp16=756,
        tf32=378,
        fp32=51,
        fp8=1513,
        compared="not verified: the figures of the H100 PCIe, which it is but for NVLink and fp64",
    ),
    _Device(r"H100 80GB HBM3", _H100_DATASHEET + " (SXM)", bf16=989, fp16=989, tf32=494, fp32=67, fp8=1979),
    _Device(r"H100 NVL", _H100_DATASHEET + " (NVL)", bf16=835, fp16=835, tf32=417, fp32=60, fp8=1670),
    _Device(r"H100 PCIe", _H100_DATASHEET + " (PCIe)", bf16=756, fp16=756, tf32=378, fp32=51, fp8=1513),
    _Device(r"H20(-3e)?", "NVIDIA H20 GPU datasheet", bf16=148, fp16=148, tf32=74, fp32=44, fp8=296),
    _Device(
        r"A100-(SXM4|PCIE)-(40|80)GB|A100 80GB PCIe",
        "NVIDIA A100 Tensor Core GPU datasheet",
        bf16=312,
        fp16=312,
        tf32=156,
        fp32=19.5,
    ),
    _Device(
        r"A800-SXM4-(40|80)GB|A800 80GB PCIe|A800 40GB (PCIe|Active)",
        "NVIDIA A800 GPU datasheet",
        bf16=312,
        fp16=312,
        tf32=156,
        fp32=19.5,
    ),
    _Device(
        r"A30",
        "NVIDIA A30 Tensor Core GPU datasheet",
        bf16=165,
        fp16=165,
        tf32=82,
        fp32=10.3,
        compared="not verified but by multiprocessors × boost clock × FLOP a clock",
    ),
    _Device(
        r"A10G",
        "NVIDIA A10G datasheet",
        bf16=70,
        fp16=70,
        tf32=35,
        fp32=35,
        compared="not verified: as quoted for the card that AWS sells, whose tensor cores run at half the A10's rate",
    ),
    _Device(r"A40", "NVIDIA A40 datasheet", bf16=149.7, fp16=149.7, tf32=74.8, fp32=37.4),
    _Device(r"A10", "NVIDIA A10 Tensor Core GPU datasheet", bf16=125, fp16=125, tf32=62.5, fp32=31.2),
    _Device(r"RTX A6000", _GA102_WHITEPAPER + ", table 3", bf16=154.8, fp16=154.8, tf32=77.4, fp32=38.7),
    _Device(
        r"RTX A5000",
        _WORKSTATION_DATASHEET.format("RTX A5000"),
        bf16=111.1,
        fp16=111.1,
        tf32=55.5,
        fp32=27.8,
        compared=_COMPUTED,
    ),
    _Device(
        r"RTX A4000",
        _WORKSTATION_DATASHEET.format("RTX A4000"),
        bf16=76.7,
        fp16=76.7,
        tf32=38.3,
        fp32=19.2,
        compared=_COMPUTED,
    ),
    _Device(
        r"RTX 6000 Ada Generation",
        _WORKSTATION_DATASHEET.format("RTX 6000 Ada Generation"),
        bf16=364.2,
        fp16=364.2,
        tf32=182.1,
        fp32=91.1,
        fp8=728.5,
        compared=_COMPUTED,
    ),
    _Device(
        r"RTX PRO 6000 Blackwell Workstation Edition",
        _WORKSTATION_DATASHEET.format("RTX PRO 6000 Blackwell Workstation Edition"),
        bf16=503.8,
        fp16=503.8,
        tf32=251.9,
        fp32=126,
        fp8=1007.6,
    ),
    _Device(
        r"RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        _WORKSTATION_DATASHEET.format("RTX PRO 6000 Blackwell Max-Q Workstation Edition"),
        bf16=440.5,
        fp16=440.5,
        tf32=220.2,
        fp32=110.1,
        fp8=881,
        compared=_COMPUTED,
    ),
    _Device(
        r"GeForce RTX 5090",
        _RTX_BLACKWELL_WHITEPAPER,
        bf16=209.5,
        fp16=209.5,
        tf32=104.8,
        fp32=104.8,
        fp8=419,
        compared=_COMPUTED,
    ),
    _Device(
        r"GeForce RTX 4080",
        _ADA_WHITEPAPER,
        bf16=97.5,
        fp16=97.5,
        tf32=48.7,
        fp32=48.7,
        fp8=194.9,
        compared=_COMPUTED,
    ),
    _Device(
        r"GeForce RTX 4070",
        _ADA_WHITEPAPER,
        bf16=58.3,
        fp16=58.3,
        tf32=29.1,
        fp32=29.1,
        fp8=116.6,
        compared=_COMPUTED,
    ),
    _Device(
        r"GeForce RTX 3060",
        _GA102_WHITEPAPER + ", whose rates per multiprocessor hold for its GA106",
        bf16=25.5,
        fp16=25.5,
        tf32=12.7,
        fp32=12.7,
        compared=_COMPUTED,
    ),
    _Device(r"GeForce RTX 3090", _GA102_WHITEPAPER + ", appendix A", bf16=71, fp16=71, tf32=35.6, fp32=35.6),
    _Device(r"GeForce RTX 4090", _ADA_WHITEPAPER, bf16=165.2, fp16=165.2, tf32=82.6, fp32=82.6, fp8=330.3),
    _Device(r"L40S", "NVIDIA L40S datasheet", bf16=362.05, fp16=362.05, tf32=183, fp32=91.6, fp8=733),
    _Device(r"L40", "NVIDIA L40 datasheet", bf16=181.05, fp16=181.05, tf32=90.5, fp32=90.5, fp8=362),
    _Device(r"L4", "NVIDIA L4 Tensor Core GPU datasheet", bf16=121, fp16=121, tf32=60, fp32=30.3, fp8=242.5),
    _Device(r"T4", "NVIDIA T4 Tensor Core GPU datasheet", fp16=65, fp32=8.1),
    _Device(r"V100-SXM2-(16|32)GB", _V100_DATASHEET + " (NVLink)", fp16=125, fp32=15.7),
    _Device(
        r"V100-SXM3-32GB",
        "NVIDIA DGX-2 datasheet: 2 petaFLOPS of 16 GPUs",
        fp16=125,
        fp32=15.7,
        compared="not verified",
    ),
    _Device(
        r"V100-DGXS-(16|32)GB",
        "NVIDIA DGX Station datasheet: 500 teraFLOPS of 4 GPUs",
        fp16=125,
        fp32=15.7,
        compared="not verified",
    ),
    _Device(
        r"V100-FHHL-16GB",
        _V100_DATASHEET + " (the half-height card's clock)",
        fp16=105.7,
        fp32=13.2,
        compared=_COMPUTED,
    ),
    _Device(r"V100-PCIE-(16|32)GB", _V100_DATASHEET + " (PCIe)", fp16=112, fp32=14),
    _Device(r"V100S-PCIE-32GB", _V100_DATASHEET + " (V100S)", fp16=130, fp32=16.4),
    _Device(
        r"Instinct MI300X( VF| OAM)?",
        "AMD Instinct MI300X data sheet (AMD footnote MI300-18)",
        bf16=1307.4,
        fp16=1307.4,
        tf32=653.7,
        fp32=163.4,
        fp8=2614.9,
    ),
)

_CDNA3 = dict(bf16=1307.4, fp16=1307.4, tf32=653.7, fp32=163.4, fp8=2614.9)
_DEVICES += (
    _Device(
        r"Instinct MI325X( VF| OAM)?",
        "AMD Instinct MI325X data sheet",
        **_CDNA3,
        compared="not verified: the figures of the MI300X, whose compute dies and clock it has",
    ),
    _Device(
        r"Instinct MI355X( VF| OAM)?",
        "AMD Instinct MI355X data sheet",
        bf16=2516.6,
        fp16=2516.6,
        fp32=157.3,
        fp8=5033.2,
        compared="not verified but by 256 compute units × 2.4 GHz × 4096 FLOP a clock; it has no TF32",
    ),
)

_COLUMN = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "tf32": "tf32",
    "bf16": "bf16",
    "fp16": "fp16",
    "fp32": "fp32",
    "fp8": "fp8",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
}


def peak_flops(device_name: str, dtype_name: str) -> Peak | None:
    """Published dense peak of a GPU by the name CUDA or ROCm reports, None where there is no published figure.

    `dtype_name` is torch's name of the compute dtype ("bfloat16", "float16", "float32") or "tf32" or "fp8".
    """
    column = _COLUMN.get(dtype_name.removeprefix("torch."))
    for device in _DEVICES:
        if column and re.fullmatch(rf"((NVIDIA|Tesla|AMD) )*({device.name})", device_name.strip(), re.IGNORECASE):
            tflops = getattr(device, column)
            return None if tflops is None else Peak(tflops * 1e12, device.cited)
    return None


# ---------------------------------------------------------------------------------------- names people use


@dataclass(frozen=True)
class Gpu:
    """A GPU one can buy: the name people use, the name CUDA or ROCm reports, and its memory in MiB as the driver reports it."""

    name: str
    reported: str
    memory_mib: int

    @property
    def memory_gb(self) -> float:
        """Its memory in GB (10^9 bytes)."""
        return self.memory_mib * 2**20 / 1e9

    def peak(self, dtype_name: str) -> Peak | None:
        """Its dense peak in a dtype, None where none is published."""
        return peak_flops(self.reported, dtype_name)


# Where a short name fits several, the first one is meant; they are ordered by how common they are in data centres.
# Memory: the total that nvidia-smi (rocm-smi) shows, ECC as it is by default; 24,564 and 81,559 MiB as reported, the others not
# verified.
GPUS = tuple(
    Gpu(*row)
    for row in (
        ("H100 SXM", "NVIDIA H100 80GB HBM3", 81_559),
        ("H100 PCIe", "NVIDIA H100 PCIe", 81_559),
        ("H100 NVL", "NVIDIA H100 NVL", 95_830),
        ("H200 SXM", "NVIDIA H200", 143_771),
        ("H200 NVL", "NVIDIA H200 NVL", 143_771),
        ("B200", "NVIDIA B200", 183_359),
        ("GB200", "NVIDIA GB200", 189_471),
        ("B300", "NVIDIA B300 SXM6 AC", 275_040),
        ("GB300", "NVIDIA GB300", 284_208),
        ("GH200", "NVIDIA GH200 480GB", 97_871),
        ("H20", "NVIDIA H20", 97_871),
        ("H20-3e", "NVIDIA H20-3e", 143_771),
        ("H800 SXM", "NVIDIA H800", 81_559),
        ("H800 PCIe", "NVIDIA H800 PCIe", 81_559),
        ("A100 SXM 80GB", "NVIDIA A100-SXM4-80GB", 81_920),
        ("A100 SXM 40GB", "NVIDIA A100-SXM4-40GB", 40_960),
        ("A100 PCIe 80GB", "NVIDIA A100 80GB PCIe", 81_920),
        ("A100 PCIe 40GB", "NVIDIA A100-PCIE-40GB", 40_960),
        ("A800 SXM 80GB", "NVIDIA A800-SXM4-80GB", 81_920),
        ("A800 PCIe 80GB", "NVIDIA A800 80GB PCIe", 81_920),
        ("A40", "NVIDIA A40", 46_068),
        ("A30", "NVIDIA A30", 24_576),
        ("A10", "NVIDIA A10", 23_028),
        ("A10G", "NVIDIA A10G", 23_028),
        ("RTX A6000", "NVIDIA RTX A6000", 49_140),
        ("RTX A5000", "NVIDIA RTX A5000", 24_564),
        ("RTX A4000", "NVIDIA RTX A4000", 16_376),
        ("RTX 6000 Ada", "NVIDIA RTX 6000 Ada Generation", 49_140),
        ("RTX PRO 6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97_887),
        ("RTX PRO 6000 Max-Q", "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 97_887),
        ("L40S", "NVIDIA L40S", 46_068),
        ("L40", "NVIDIA L40", 46_068),
        ("L4", "NVIDIA L4", 23_034),
        ("T4", "Tesla T4", 15_360),
        ("RTX 5090", "NVIDIA GeForce RTX 5090", 32_607),
        ("RTX 4090", "NVIDIA GeForce RTX 4090", 24_564),
        ("RTX 4080", "NVIDIA GeForce RTX 4080", 16_376),
        ("RTX 4070", "NVIDIA GeForce RTX 4070", 12_282),
        ("RTX 3090", "NVIDIA GeForce RTX 3090", 24_576),
        ("RTX 3060", "NVIDIA GeForce RTX 3060", 12_288),
        ("V100 SXM2 32GB", "Tesla V100-SXM2-32GB", 32_768),
        ("V100 SXM2 16GB", "Tesla V100-SXM2-16GB", 16_384),
        ("V100 SXM3 32GB", "Tesla V100-SXM3-32GB", 32_768),
        ("V100 PCIe 32GB", "Tesla V100-PCIE-32GB", 32_768),
        ("V100 PCIe 16GB", "Tesla V100-PCIE-16GB", 16_384),
        ("V100S PCIe 32GB", "Tesla V100S-PCIE-32GB", 32_768),
        ("MI300X", "AMD Instinct MI300X", 196_592),
        ("MI325X", "AMD Instinct MI325X", 262_128),
        ("MI355X", "AMD Instinct MI355X", 294_896),
    )
)

# Sizes in which cards are sold, in GB, and the MiB that one of them reports (8: RTX 4060; 12: RTX 4070; 16: T4; 24: RTX 4090;
# 32: RTX 5090; 40 and 80: A100 and H100; 48: L40S; 96: H20; 141: H200; 192: MI300X). Of cards of one size the least may be
# 6 % less, as ECC takes some of it (A10: 23,028).
CARD_MIB = {
    8: 8_188,
    12: 12_282,
    16: 15_360,
    24: 24_564,
    32: 32_607,
    40: 40_960,
    48: 46_068,
    80: 81_559,
    96: 97_871,
    141: 143_771,
    192: 196_592,
}


_BRANDS = {"nvidia", "amd", "tesla", "geforce", "instinct", "gpu"}
_VARIANT = re.compile(r"(\d+gb|sxm|pcie|nvl|rtx)$")  # words that name no GPU by themselves


def find_gpu(name: str) -> tuple[Gpu, list[str]]:
    """A name as people write it ('H100', 'a100-80gb', '4090', or the one CUDA reports) → the GPU, and the names of
    others that it fits too. Raises ValueError with the nearest names where it fits none.
    """
    for gpu in GPUS:
        if name.strip().lower() in (gpu.reported.lower(), gpu.name.lower()):
            return gpu, []
    words = _words(name)
    named = any(not _VARIANT.match(word) for word in words)
    fitting = [
        gpu
        for gpu in GPUS
        if named and (words <= _words(gpu.name) | _words(gpu.reported) or _squeezed(name) == _squeezed(gpu.name))
    ]
    if not fitting:
        import difflib

        short = {gpu.name.lower(): gpu.name for gpu in GPUS}
        near = difflib.get_close_matches(name.lower(), short, n=3, cutoff=0.4)
        hint = f"nearest: {', '.join(short[key] for key in near)}; " if near else ""
        raise ValueError(f"{name!r} is no GPU whose figures are known here ({hint}known: {', '.join(gpu.name for gpu in GPUS)}).")
    return fitting[0], [gpu.name for gpu in fitting[1:]]


def _squeezed(name: str) -> str:
    return "".join(re.findall(r"[a-z0-9]+", name.lower()))


def _words(name: str) -> set[str]:
    """'A100-SXM4-80GB' → {'a100', 'sxm', '80gb'}: what tells GPUs apart, brands and socket generations left out."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?i)(?<=\d) gb\b", "gb", name).lower())
    return {re.sub(r"^sxm\d$", "sxm", word) for word in words} - _BRANDS


# ---------------------------------------------------------------------------------------- measured peak

_measured: dict[tuple, Peak] = {}


def measure_cpu_peak(dtype: str | torch.dtype, again: bool = False) -> Peak:
    """This CPU's matrix-product FLOP/s in `dtype` with the current number of threads: the best of several, in about 0.4 s.

    The products are the three of a linear layer (its output and its two gradients): where a CPU has no instructions for a
    dtype, PyTorch's own loops differ by a factor of 20 between them. A product's time is the clock's, or the processor time
    that its threads had if that is less: what other work takes of the processor is not counted. `source` says where it was
    much.
    Measured once per dtype and number of threads, unless `again` asks for another try (the better one stays). Draws no
    random numbers, so that it cannot disturb a run's reproducibility.
    """
    import torch

    key = (_torch_dtype(dtype), torch.get_num_threads())
    if again or key not in _measured:
        tries = [_measure_cpu_peak(*key)] + ([_measured[key]] if key in _measured else [])
        _measured[key] = max(tries, key=lambda peak: peak.flops)
    return _measured[key]


def _measure_cpu_peak(dtype: torch.dtype, threads: int, seconds: float = 0.4) -> Peak:
    """The better of two lower bounds: by the clock, and by the processor time that the threads had.

    The second one takes the threads for equally busy, so it counts only up to `threads` times what one alone reaches.
    """
    import torch

    clock, processor, size = _best_product(dtype, seconds if threads == 1 else 0.75 * seconds)
    best = max(clock, processor)
    if threads > 1:
        try:
            torch.set_num_threads(1)
            best = max(clock, min(processor * threads, threads * max(_best_product(dtype, 0.25 * seconds, size)[:2])))
        finally:
            torch.set_num_threads(threads)
    other = "" if clock > SHARED * best else f", of whose time other work had {1 - clock / best:.0%}"
    name = str(dtype).removeprefix("torch.")
    return Peak(best, f"measured: {name} matrix product, {threads} thread{'s' if threads > 1 else ''}{other}", measured=True)


def _best_product(dtype: torch.dtype, seconds: float, size: int = 256) -> tuple[float, float, int]:
    """FLOP/s of the fastest matrix product by the clock, and by the processor time of all threads together; its size."""
    import torch

    end = time.perf_counter() + seconds
    by_clock, by_processor, elapsed, shortest = 0.0, 0.0, 0.0, 0.0
    a = b = None
    with torch.no_grad():
        while a is None or time.perf_counter() + elapsed < end:
            if a is None or (shortest < 0.005 and size < 8192):  # until one takes long enough to time and to fill the cores
                size *= 1 if a is None and size > 256 else 2
                a, b = (torch.ones(size, size, dtype=dtype, device="cpu") for _ in range(2))
            clocks = []
            for left, right in ((a, b.t()), (a, b), (a.t(), b)):  # x·Wᵀ, g·W, gᵀ·x
                begin, used = time.perf_counter(), time.process_time()
                left @ right
                clocks.append(time.perf_counter() - begin)
                by_processor = max(by_processor, 2 * size**3 / max(time.process_time() - used, 1e-9))
            shortest, elapsed = min(clocks), sum(clocks)
            by_clock = max(by_clock, 2 * size**3 / shortest)
    return by_clock, by_processor, size


SHARED = 0.75  # where the clock gives less than this of a measured peak, it says that other work was there


def device_peak(device: str | torch.device, dtype: str | torch.dtype, tflops: float | None = None) -> Peak | None:
    """The peak that a run on `device` in `dtype` is compared with: measured for a CPU, published for a GPU, else None.

    tflops: what the user says it is, in TFLOP/s, which goes before both.

    float32 on a GPU that may use TF32 for matrix products is compared with the TF32 peak.
    """
    import torch

    device, dtype = torch.device(device), _torch_dtype(dtype)
    if tflops is not None:
        return Peak(tflops * 1e12, "as peak_tflops says")
    if device.type == "cpu":
        return measure_cpu_peak(dtype)
    if device.type != "cuda":
        return None
    tf32 = dtype is torch.float32 and getattr(torch.backends.cuda.matmul, "fp32_precision", "none") == "tf32"
    return peak_flops(torch.cuda.get_device_name(device), "tf32" if tf32 else str(dtype))


def _torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch.dtype, given as itself or by its name."""
    import torch

    return getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype


# ------------------------------------------------------------------------------------------- best dtype


def cpu_flags(cpuinfo: str | None = None) -> frozenset[str]:
    """Instruction-set flags of this CPU as Linux names them, from /proc/cpuinfo (or the text given); empty if unknown."""
    if cpuinfo is None:
        try:
            with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
                cpuinfo = file.read()
        except OSError:
            return frozenset()
    match = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    return frozenset(match.group(1).split()) if match else frozenset()


def best_dtype(device: str | torch.device, flags: str | Collection[str] | None = None) -> str:
    """ "bfloat16" where the hardware computes in it, else "float32": what dtype='auto' means.

    GPUs: compute capability 8.0 and up (and AMD's, which report 9.0). CPUs: AVX512-BF16 or AMX-BF16. PyTorch runs
    bfloat16 on lesser devices too, and its own checks say so, but emulated: slower than float32.
    `flags`: CPU flags to judge instead of this machine's, as text or a set.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        flags = cpu_flags() if flags is None else flags.split() if isinstance(flags, str) else flags
        native = not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)
    else:
        native = False
    return "bfloat16" if native else "float32"
