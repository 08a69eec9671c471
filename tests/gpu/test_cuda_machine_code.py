"""The machine code of the CUDA kernels that matter most, for sm_90, read without a GPU."""

from __future__ import annotations

import re
import shutil

import cuda_machine_code
import pytest
from cuda_resources import assert_written

from benchmarks.harness import conv_roofline, roofline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tools() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    if cuda_machine_code.disassembler() is None:
        pytest.skip("needs cuobjdump")


@pytest.fixture(scope="module")
def codes(tools) -> list[roofline.Kernel]:
    return cuda_machine_code.measured()


@pytest.fixture(scope="module")
def convolutions(tools) -> list[conv_roofline.ConvKernel]:
    return cuda_machine_code.measured_convolutions()


def test_it_is_that_of_the_table(codes):
    assert_written(roofline.TABLE, cuda_machine_code.lines(codes), "cuda_machine_code.py")


def test_that_of_convolutions_is_too(convolutions):
    lines = cuda_machine_code.lines_of_convolutions(convolutions)
    assert_written(conv_roofline.TABLE, lines, "cuda_machine_code.py")


def test_what_is_written_is_read_again():
    for module in (roofline, conv_roofline):
        written = module.TABLE.read_text().splitlines()
        assert [module.line(kernel) for kernel in module.kernels()] == written[2:]


def test_nothing_spills(codes, convolutions):
    assert [code.name for code in (*codes, *convolutions) if code.spills] == []


def test_every_way_round_reads_and_writes_whole_vectors(codes):
    """A narrow store is of max pooling's offsets, one beside each vector of outputs."""
    for code in codes:
        assert code.loads.get(16, 0) > 0, code
        names = "stats_parts", "sums_parts", "plane_means", "pool_whole"
        sums_alone = code.name.startswith(names) and not code.stores
        narrow = {width: n for width, n in code.stores.items() if width < 16}
        assert sums_alone or sum(narrow.values()) <= code.stores[16], code


def test_all_loads_of_a_step_are_asked_for_before_the_first_is_used(codes):
    for code in codes:
        if code.name.startswith(WINDOWS_ONE_BY_ONE):
            continue
        asked = code.asked
        if "ToWinnerThroughNorm" in code.name:  # which reads the input where its gradient is made
            asked -= code.written
        elif "Normalized" in code.name:  # whose coefficients leave registers for half of them
            asked /= 2
        # But for a byte or two of a neighbor.
        assert code.in_flight >= asked - 4, code


#: Their loads are in branches or loops of their own: docs/gpu.md says what that costs average pooling.
WINDOWS_ONE_BY_ONE = "pool_", "gather_"


def test_the_documentation_has_what_the_model_expects():
    written = (roofline.TABLE.parents[2] / "docs" / "gpu.md").read_text().splitlines()
    for row in (*roofline.summary(), *conv_roofline.summary()):
        assert row in written, row


def test_every_kernel_is_of_one_kind():
    for kernel in roofline.kernels():
        kinds = [kind for kind, names in roofline.KINDS.items() if re.match(names, kernel.name)]
        assert len(kinds) == 1, kernel


@pytest.mark.parametrize("kernel", list(roofline.kernels()), ids=lambda kernel: kernel.name.replace(" ", ""))
def test_the_model_expects_nearly_a_copys_speed(kernel):
    if kernel.name.startswith(("pool_pixels", "pool_runs", "gather_")):
        pytest.skip("of average pooling the documentation has what is expected")
    # Nine windows cover each input, and two bytes of traffic leave little time to compare with each.
    crowded = all(part in kernel.name for part in ("max_pool_cells", "Square<3, 1, 1>", "__nv_bfloat16"))
    # Of whole planes in channels-last each load is waited for, by as many threads as registers allow.
    waits = kernel.name.startswith("pool_whole_pixels") and kernel.in_flight == 16
    least = 0.55 if crowded else 0.65 if waits else 0.9
    assert roofline.share(kernel) >= least, roofline.seconds(kernel)


def average(name: str, loads: int) -> roofline.Kernel:
    return roofline.Kernel(name, 64, 0, 900, {16: loads}, {16: 1}, 16)


def test_what_averages_move():
    """3x3 windows in steps of 2: four inputs and an output; of the output one gradient for four inputs."""
    of, window = "<__nv_bfloat16>", "Square<3, 2, 1>, 8>"
    assert average(f"pool_pixels<SumOp{of}, {window}", 9).traffic == 16 * 5
    pixels = average(f"gather_pixels<ToAll{of}, {window}", 9)
    assert pixels.traffic == 16 * 1.25
    assert pixels.rounds == 2.25 / 9  # nine loads are in the code, and 2.25 windows cover an element
    assert average(f"gather_runs<ToAll{of}, {window}", 1).rounds == 1.5


def test_a_convolution_is_as_slow_as_its_slowest_part():
    kernel = conv_roofline.ConvKernel("conv_kernel<__nv_bfloat16, 0, 8>", 128, 0, "HMMA", 160, 32, 192, 128)
    limits = conv_roofline.cycles(kernel)
    assert limits == {
        "products": 64,
        "issue": 40,
        "shared": 80,
        "fetch": pytest.approx(4096 / (5120 / 108)),
    }
    assert conv_roofline.share(kernel) == pytest.approx(64 / limits["fetch"])


def listing(*lines: str) -> dict[int, str]:
    return {16 * i: line for i, line in enumerate(lines)}


def test_the_way_round_leaves_out_what_is_for_special_values():
    code = listing(
        "MOV R1, R2",
        "LDG.E.128 R4, desc[UR4][R2.64]",  # 0x10
        "LDG.E.128 R8, desc[UR4][R12.64]",
        "FADD R4, R4, R8",
        "@!P0 BRA 0x70",
        "LDG.E.U16 R20, desc[UR4][R2.64]",
        "BRA 0x80",
        "STG.E.128 desc[UR4][R2.64], R4",
        "@P1 BRA 0x10",
        "EXIT",
    )
    way = [code[at] for at in cuda_machine_code._way_round(code)]
    assert way == [code[16 * i] for i in (1, 2, 3, 4, 7, 8)]
    assert cuda_machine_code._accesses(way, "LDG") == {16: 2}
    assert cuda_machine_code._in_flight(way) == 32


def test_the_way_of_products_leaves_out_the_prologue():
    code = listing(
        "@!P0 BRA 0x30",  # 0x0, the loop begins
        "FFMA R4, R4, R5, R6",
        "LDS.128 R8, [R2]",
        "BAR.SYNC.DEFER_BLOCKING 0x0",  # 0x30
        "@!P1 BRA 0x60",
        "LDGSTS.E.BYPASS.128 [R2], desc[UR4][R6.64]",
        "LDSM.16.M88.4 R8, [R2]",  # 0x60
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "@P2 BRA 0x0",
        "EXIT",
    )
    way = [code[at] for at in cuda_machine_code._way_of_products(code)]
    assert way == [code[16 * i] for i in (0, 3, 4, 5, 6, 7, 8)]
    assert sum(cuda_machine_code._bytes(text, r"LDSM?\b") for text in way) == 16
    assert sum(cuda_machine_code._bytes(text, r"LDGSTS\b") for text in way) == 16


def test_a_load_that_waits_for_another_is_not_in_flight_with_it():
    way = ["LDG.E.64 R2, desc[UR4][R4.64]", "LDG.E.128 R8, desc[UR4][R2.64]", "FADD R8, R8, R9"]
    assert cuda_machine_code._in_flight(way) == 16
    way = ["LDG.E R2, desc[UR4][R4.64]", "IADD3 R3, R2, R2, RZ", "LDG.E R9, desc[UR4][R4.64]"]
    assert cuda_machine_code._in_flight(way) == 4
