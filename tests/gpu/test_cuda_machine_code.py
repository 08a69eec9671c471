"""The machine code of the CUDA kernels that matter most, for sm_90, read without a GPU."""

from __future__ import annotations

import shutil

import cuda_machine_code
import pytest
from cuda_resources import assert_written

from benchmarks.harness import roofline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def codes() -> list[roofline.Kernel]:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    if cuda_machine_code.disassembler() is None:
        pytest.skip("needs cuobjdump")
    return cuda_machine_code.measured()


def test_it_is_that_of_the_table(codes):
    assert_written(roofline.TABLE, cuda_machine_code.lines(codes), "cuda_machine_code.py")


def test_what_is_written_is_read_again():
    written = roofline.TABLE.read_text().splitlines()
    assert [roofline.line(kernel) for kernel in roofline.kernels()] == written[2:]


def test_nothing_spills(codes):
    assert [code.name for code in codes if code.spills] == []


def test_every_way_round_reads_and_writes_whole_vectors(codes):
    """A narrow store is of max pooling's offsets, one beside each vector of outputs."""
    for code in codes:
        assert code.loads.get(16, 0) > 0, code
        names = "stats_parts", "sums_parts", "plane_means"
        sums_alone = code.name.startswith(names) and not code.stores
        narrow = {width: n for width, n in code.stores.items() if width < 16}
        assert sums_alone or sum(narrow.values()) <= code.stores[16], code


def test_all_loads_of_a_step_are_asked_for_before_the_first_is_used(codes):
    for code in codes:
        asked = code.asked
        if "ToWinnerThroughNorm" in code.name:  # which reads the input where its gradient is made
            asked -= code.written
        elif "Normalized" in code.name:  # whose coefficients leave registers for half of them
            asked /= 2
        # But for a byte or two of a neighbor.
        assert code.in_flight >= asked - 4, code


@pytest.mark.parametrize("kernel", list(roofline.kernels()), ids=lambda kernel: kernel.name.replace(" ", ""))
def test_the_model_expects_nearly_a_copys_speed(kernel):
    # Nine windows cover each input, and two bytes of traffic leave little time to compare with each.
    crowded = all(part in kernel.name for part in ("max_pool_cells", "Square<3, 1, 1>", "__nv_bfloat16"))
    assert roofline.share(kernel) >= (0.55 if crowded else 0.9), roofline.seconds(kernel)


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


def test_a_load_that_waits_for_another_is_not_in_flight_with_it():
    way = ["LDG.E.64 R2, desc[UR4][R4.64]", "LDG.E.128 R8, desc[UR4][R2.64]", "FADD R8, R8, R9"]
    assert cuda_machine_code._in_flight(way) == 16
    way = ["LDG.E R2, desc[UR4][R4.64]", "IADD3 R3, R2, R2, RZ", "LDG.E R9, desc[UR4][R4.64]"]
    assert cuda_machine_code._in_flight(way) == 4
