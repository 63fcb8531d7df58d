"""Peaks are published or measured, never guessed; bfloat16 is chosen only where the hardware has it."""

from __future__ import annotations

import time

import pytest
import torch

from flops_parameter_counting import hardware
from flops_parameter_counting.hardware import GPUS, best_dtype, cpu_flags, device_peak, find_gpu, measure_cpu_peak, peak_flops

# Names as torch.cuda.get_device_name gives them, and dense TFLOP/s of bfloat16 (float16 where there is no bfloat16) to the
# precision they are usually quoted in, apart from the table.
QUOTED = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "A100-SXM4-40GB": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 835,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA B200": 2250,
    "NVIDIA H20": 148,
    "NVIDIA H20-3e": 148,
    "NVIDIA L4": 121,
    "NVIDIA L40S": 362,
    "NVIDIA A10": 125,
    "NVIDIA RTX A6000": 155,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165,
    "AMD Instinct MI300X": 1307,
    "AMD Instinct MI325X": 1307,
    "AMD Instinct MI355X": 2517,
    "NVIDIA B300 SXM6 AC": 2250,
    "NVIDIA GB300": 2500,
    "NVIDIA H800": 989,
    "NVIDIA A800-SXM4-80GB": 312,
    "NVIDIA A800 80GB PCIe": 312,
    "NVIDIA A30": 165,
    "NVIDIA A10G": 70,
    "NVIDIA RTX A4000": 76.7,
    "NVIDIA RTX A5000": 111.1,
    "NVIDIA RTX 6000 Ada Generation": 364.2,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 503.8,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA GeForce RTX 4080": 97.5,
    "NVIDIA GeForce RTX 4070": 58.3,
    "NVIDIA GeForce RTX 3060": 25.5,
}

# Multiprocessors (compute units), boost clock in GHz, dense FLOP that each does a clock in bf16 or fp16 with sums in fp32.
# GeForce cards do half of what the same chip does on a workstation's.
MADE_OF = {
    "NVIDIA A100-SXM4-80GB": (108, 1.41, 2048),
    "NVIDIA A30": (56, 1.44, 2048),
    "NVIDIA A40": (84, 1.74, 1024),
    "NVIDIA A10": (72, 1.695, 1024),
    "NVIDIA RTX A6000": (84, 1.8, 1024),
    "NVIDIA RTX A5000": (64, 1.695, 1024),
    "NVIDIA RTX A4000": (48, 1.56, 1024),
    "NVIDIA GeForce RTX 3090": (82, 1.695, 512),
    "NVIDIA GeForce RTX 3060": (28, 1.777, 512),
    "NVIDIA RTX 6000 Ada Generation": (142, 2.505, 1024),
    "NVIDIA GeForce RTX 4090": (128, 2.52, 512),
    "NVIDIA GeForce RTX 4080": (76, 2.505, 512),
    "NVIDIA GeForce RTX 4070": (46, 2.475, 512),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": (188, 2.617, 1024),
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": (188, 2.288, 1024),
    "NVIDIA GeForce RTX 5090": (170, 2.407, 512),
    "NVIDIA H100 80GB HBM3": (132, 1.83, 4096),
    "Tesla V100-SXM2-16GB": (80, 1.53, 1024),
    "Tesla V100-FHHL-16GB": (80, 1.29, 1024),
    "AMD Instinct MI300X": (304, 2.1, 2048),
    "AMD Instinct MI325X": (304, 2.1, 2048),
    "AMD Instinct MI355X": (256, 2.4, 4096),
}


@pytest.mark.parametrize("name", MADE_OF)
def test_a_peak_is_what_the_multiprocessors_do_at_the_boost_clock(name):
    """Issue 14.10: a second way to the figures."""
    number, clock, a_clock = MADE_OF[name]
    peak = peak_flops(name, "bfloat16") or peak_flops(name, "float16")
    assert peak.flops == pytest.approx(number * clock * 1e9 * a_clock, rel=0.005)


def test_other_work_does_not_lower_a_measured_peak(monkeypatch):
    """Issue 14.10: other work had two thirds of the processor, and the peak came out three times too low: mfu 74.8 %."""
    key = (torch.float32, torch.get_num_threads())
    alone = measure_cpu_peak("float32", again=True)

    class Crowded:  # the clock goes on while others have the processor
        perf_counter = staticmethod(lambda: 3 * time.process_time())
        process_time = staticmethod(time.process_time)

    monkeypatch.setattr(hardware, "time", Crowded)
    monkeypatch.setattr(hardware, "_measured", {})
    crowded = hardware._measure_cpu_peak(*key, seconds=1.2)
    assert alone.flops / 2 < crowded.flops < alone.flops * 2
    assert "of whose time other work had 6" in crowded.source or "of whose time other work had 7" in crowded.source


def test_threads_that_wait_for_each_other_do_not_count_as_fast_ones(monkeypatch):
    """Issue 14.10: what a second thread does not work is not taken for speed: a product on one of eight threads."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # there is one, whatever is asked
    one, eight = (hardware._measure_cpu_peak(torch.float32, threads, seconds=0.5) for threads in (1, 8))
    assert eight.flops < 10 * one.flops
    monkeypatch.setattr(
        hardware, "_best_product", lambda dtype, seconds, size=256: (1e9, 4e9, 512) if size == 256 else (1e9, 1e9, 512)
    )
    assert hardware._measure_cpu_peak(torch.float32, 8).flops == 8e9  # eight times one thread, not eight times 4e9


def test_a_peak_that_is_given_goes_before_the_table_and_the_measurement():
    """Issue 14.10: peak_tflops for what is not listed."""
    for device in ("cpu", "cuda"):
        assert device_peak(device, "float32", 12.5) == hardware.Peak(12.5e12, "as peak_tflops says")


@pytest.mark.parametrize("name", QUOTED)
def test_known_gpus_have_their_published_dense_peak_and_its_source(name):
    peak = peak_flops(name, "bfloat16")
    assert peak.flops / 1e12 == pytest.approx(QUOTED[name], rel=0.002)
    assert not peak.measured and ("datasheet" in peak.source or "data sheet" in peak.source or "whitepaper" in peak.source)
    assert peak_flops(name, "torch.bfloat16") == peak


@pytest.mark.parametrize("name, tflops", [("Tesla T4", 65), ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-32GB", 112)])
def test_gpus_older_than_bfloat16_have_no_peak_for_it(name, tflops):
    assert peak_flops(name, "float16").flops == tflops * 1e12
    assert peak_flops(name, "bfloat16") is None
    assert peak_flops(name, "tf32") is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NVIDIA GeForce GTX 1080",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A100-SXM-64GB",
        "GRID A100-10C",
        "NVIDIA H100",
        "NVIDIA H2000",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "NVIDIA B2000",
        "Quadro T4000",
        "AMD Instinct MI300A",
        "AMD EPYC",
    ],
)
def test_an_unknown_name_has_no_peak_even_if_it_resembles_a_known_one(name):
    assert all(peak_flops(name, dtype) is None for dtype in ("bfloat16", "float16", "float32", "tf32", "fp8"))


def test_an_unknown_dtype_has_no_peak():
    assert peak_flops("NVIDIA H100 PCIe", "int8") is None


@pytest.mark.parametrize("device", hardware._DEVICES, ids=lambda device: device.name)
def test_the_peaks_of_a_device_stand_in_the_ratios_of_its_tensor_cores(device):
    if device.bf16:
        assert device.bf16 == device.fp16
        assert device.tf32 is None or device.tf32 == pytest.approx(device.bf16 / 2, rel=0.03)
    if device.fp8:
        assert device.fp8 == pytest.approx(2 * device.bf16, rel=0.02)
    assert device.fp32 <= (device.tf32 or device.fp16)


@pytest.mark.parametrize("device", hardware._DEVICES, ids=lambda device: device.name)
def test_every_row_names_its_source_and_says_where_it_was_not_compared_with_it(device):
    assert device.source and device.compared
    assert ("(not verified)" in device.cited) == ("not verified" in device.compared)


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("B200", 4500),
        ("H100 SXM", 1979),
        ("H200 SXM", 1979),
        ("H100 NVL", 1671),
        ("H100 PCIe", 1513),
        ("L4", 242),
        ("GB200", 5000),
        ("A100", 624),
    ],
)
def test_peaks_are_dense_half_of_what_the_datasheets_print_with_sparsity(name, tflops):
    assert find_gpu(name)[0].peak("bfloat16").flops / 1e12 == pytest.approx(tflops / 2, rel=1e-3)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_gpu_that_can_be_named_has_a_peak_and_is_found_by_its_names(gpu):
    assert gpu.peak("bfloat16") or gpu.peak("float16")
    for name in (gpu.name, gpu.reported, gpu.name.lower(), f" {gpu.name} "):
        assert find_gpu(name) == (gpu, [])


@pytest.mark.parametrize(
    "name, taken, others",
    [
        ("H100", "H100 SXM", {"H100 PCIe", "H100 NVL"}),
        ("H200", "H200 SXM", {"H200 NVL"}),
        ("4090", "RTX 4090", set()),
        ("A100", "A100 SXM 80GB", {"A100 SXM 40GB", "A100 PCIe 80GB", "A100 PCIe 40GB"}),
        ("a100-40gb", "A100 SXM 40GB", {"A100 PCIe 40GB"}),
        ("A100 80 GB PCIe", "A100 PCIe 80GB", set()),
        ("h100-sxm5", "H100 SXM", set()),
        ("RTX4090", "RTX 4090", set()),
        ("NVIDIA GeForce RTX 3090", "RTX 3090", set()),
        ("A6000", "RTX A6000", set()),
        ("L40", "L40", set()),
        ("H20", "H20", set()),
        ("B200", "B200", set()),
        ("T4", "T4", set()),
        ("mi300x", "MI300X", set()),
        ("Nvidia H100 NVL", "H100 NVL", set()),
    ],
)
def test_a_short_name_finds_the_gpu_and_says_what_else_it_fits(name, taken, others):
    gpu, also = find_gpu(name)
    assert gpu.name == taken and set(also) == others


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("H1000", "H100 SXM"),
        ("RTX 5099", "RTX 5090"),
        ("A1000", "A10"),
        ("", "known"),
        ("80GB", "known"),
        ("SXM", "known"),
        ("NVIDIA", "known"),
        ("RTX", "known"),
        ("H100 80GB PCIe MIG 1g.10gb", "known"),
    ],
)
def test_a_name_that_fits_none_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=rf"is no GPU whose figures are known here.*{nearest}"):
        find_gpu(name)


def test_fp8_and_tf32_have_columns_of_their_own():
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp8").flops == 1979e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "float8_e4m3fn") == peak_flops("NVIDIA H100 80GB HBM3", "fp8")
    assert peak_flops("NVIDIA A100-SXM4-80GB", "tf32").flops == 156e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp8") is None  # Ampere has none


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_the_measured_peak_of_a_cpu_is_what_a_matrix_product_reaches(name):
    before = torch.random.get_rng_state()
    dtype = getattr(torch, name)
    a, b = torch.ones(512, 512).to(dtype), torch.ones(512, 512).to(dtype)
    for attempt in range(5):  # other tests run beside this one, and may take the processor at one of the two moments
        peak = measure_cpu_peak(name, again=attempt > 0)
        assert peak.measured and peak.source.startswith(f"measured: {name}")
        assert torch.equal(torch.random.get_rng_state(), before)  # it must not disturb the run
        times = []
        for left, right in 3 * [(a, b), (a, b.t()), (a.t(), b), (a.t(), b.t())]:
            begin = time.perf_counter()
            torch.mm(left, right)
            times.append(time.perf_counter() - begin)
        rate = 2 * 512**3 / min(times)
        if rate / 4 < peak.flops < rate * 4:
            return
    pytest.fail(f"measured {peak.flops:.3g}, a product reaches {rate:.3g}")


def test_the_peak_is_measured_once_and_shortly():
    measure_cpu_peak.__globals__["_measured"].clear()
    begin = time.perf_counter()
    first = measure_cpu_peak(torch.float32)
    middle = time.perf_counter()
    again = device_peak("cpu", "float32")
    end = time.perf_counter()
    assert again is first
    assert middle - begin < 2.0 and end - middle < 0.01  # about 0.4 s when nothing else runs


def test_threads_are_measured_separately():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert measure_cpu_peak("float32").source.endswith("1 thread")
    finally:
        torch.set_num_threads(threads)


def test_a_device_peak_is_looked_up_by_the_name_of_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    assert device_peak("cuda:0", "bfloat16") == peak_flops("NVIDIA H100 80GB HBM3", "bfloat16")
    assert device_peak("mps", "float32") is None


@pytest.mark.parametrize("allowed, held_against", [("highest", "float32"), ("high", "tf32")])
def test_float32_is_held_against_the_tf32_peak_where_tf32_is_allowed(monkeypatch, allowed, held_against):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(allowed)
        assert device_peak("cuda", torch.float32) == peak_flops("NVIDIA H100 80GB HBM3", held_against)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("fpu sse2 avx2 avx512f avx512bw avx512_vnni", "float32"),
        ("avx512f avx512_bf16", "bfloat16"),
        ("avx512f amx_bf16 amx_tile", "bfloat16"),
        ("avx512f amx_tile amx_int8", "float32"),
        ("", "float32"),
    ],
)
def test_a_cpu_computes_in_bfloat16_only_with_the_instructions_for_it(flags, expected):
    assert best_dtype("cpu", flags) == expected
    assert best_dtype("cpu", cpu_flags(f"model name\t: X\nflags\t\t: {flags}\nbugs\t: y\n")) == expected


def test_the_choice_for_this_cpu_agrees_with_torch():
    if not cpu_flags():
        pytest.skip("no /proc/cpuinfo flags on this system")
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert best_dtype("cpu") == ("bfloat16" if native else "float32")


@pytest.mark.parametrize(
    "capability, expected",
    [
        ((7, 0), "float32"),
        ((7, 5), "float32"),
        ((8, 0), "bfloat16"),
        ((8, 9), "bfloat16"),
        ((9, 0), "bfloat16"),
        ((10, 0), "bfloat16"),
    ],
)
def test_a_gpu_computes_in_bfloat16_from_compute_capability_8(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert best_dtype("cuda") == expected


def test_other_devices_compute_in_float32():
    assert best_dtype("mps") == "float32"
