"""The assertions of perturbed/testing.py must fail where they should, and say where."""

import pytest
import torch

from perturbed import _C, testing
from perturbed.testing import assert_bitwise_equal, assert_close_to_reference


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_id)
def test_bitwise_equal_accepts_equal_bits(dtype):
    a = torch.tensor([[1.0, -0.0], [float("nan"), float("inf")]], dtype=dtype)
    assert_bitwise_equal(a, a.clone())
    assert_bitwise_equal(a.mT, a.clone().mT)
    assert_bitwise_equal(a[:0], a[:0])


def test_bitwise_equal_names_the_first_difference():
    a = torch.zeros(2, 3, 4)
    b = a.clone()
    b[1, 0, 2] = -0.0
    b[1, 2, 3] = 7
    with pytest.raises(AssertionError, match=r"2 of 24 .* first at \(1, 0, 2\)") as failure:
        assert_bitwise_equal(a, b)
    assert "0x00000000" in str(failure.value)
    assert "0x80000000" in str(failure.value)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_id)
def test_bitwise_equal_sees_one_ulp(dtype):
    a = torch.ones(5, dtype=dtype)
    b = a.clone()
    b[3] = torch.nextafter(b[3], b[3] + 1)
    with pytest.raises(AssertionError, match=r"1 of 5 .* first at \(3,\)"):
        assert_bitwise_equal(a, b)


def test_bitwise_equal_compares_dtype_and_shape():
    with pytest.raises(AssertionError, match=r"dtype torch\.float32, expected torch\.float64"):
        assert_bitwise_equal(torch.ones(2), torch.ones(2).double())
    with pytest.raises(AssertionError, match=r"shape \(2,\), expected \(2, 1\)"):
        assert_bitwise_equal(torch.ones(2), torch.ones(2, 1))


def _product(dtype):
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(64, 200, generator=generator).to(dtype)
    b = torch.randn(200, 32, generator=generator).to(dtype)
    return a @ b, a.double() @ b.double()


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_id)
def test_close_to_reference_accepts_rounding_and_rejects_a_shift(dtype):
    plain, reference = _product(dtype)
    assert_close_to_reference(plain, plain, reference)
    assert_close_to_reference(reference.to(dtype), plain, reference)
    largest = reference.abs().max()
    shifted = (reference + 8 * torch.finfo(dtype).eps * largest).to(dtype)
    with pytest.raises(AssertionError, match=r"max abs error .* relative L2 .* cosine .* first at"):
        assert_close_to_reference(shifted, reference.to(dtype), reference)


def test_close_to_reference_names_the_first_offender():
    plain, reference = _product(torch.float32)
    wrong = plain.clone()
    wrong[2, 5] += 1e-2
    wrong[60, 1] -= 1
    with pytest.raises(AssertionError, match=r"2 of 2048 elements offend, first at \(2, 5\)"):
        assert_close_to_reference(wrong, plain, reference)


def test_close_to_reference_rejects_nan_and_a_low_precision_reference():
    plain, reference = _product(torch.float32)
    wrong = plain.clone()
    wrong[0, 0] = float("nan")
    with pytest.raises(AssertionError, match=r"first at \(0, 0\)"):
        assert_close_to_reference(wrong, plain, reference)
    with pytest.raises(AssertionError, match="reference must be float64"):
        assert_close_to_reference(plain, plain, reference.float())
    with pytest.raises(AssertionError, match="shape"):
        assert_close_to_reference(plain[:1], plain, reference)


def test_devices_mark_cuda(monkeypatch):
    monkeypatch.delenv("PERTURBED_TEST_DEVICE", raising=False)
    cpu, cuda = testing.devices()
    assert (cpu.values, cpu.id, list(cpu.marks)) == (("cpu",), "cpu", [])
    assert (cuda.values, cuda.id, [m.name for m in cuda.marks]) == (("cuda",), "cuda", ["cuda"])


def test_devices_override(monkeypatch):
    monkeypatch.setenv("PERTURBED_TEST_DEVICE", "cuda:1, cpu")
    first, second = testing.devices()
    assert (first.values, second.values) == (("cuda:1",), ("cpu",))
    assert [mark.name for mark in first.marks] == ["cuda"]
    monkeypatch.setenv("PERTURBED_TEST_DEVICE", "abacus")
    with pytest.raises(ValueError, match=r"PERTURBED_TEST_DEVICE must name .* got 'abacus'"):
        testing.devices()


def test_cpu_capability_is_restored():
    before = _C.cpu_capability()
    with testing.cpu_capability("portable"):
        assert _C.cpu_capability() == "portable"
    assert _C.cpu_capability() == before
    with pytest.raises(ZeroDivisionError), testing.cpu_capability("portable"):
        raise ZeroDivisionError
    assert _C.cpu_capability() == before
    with pytest.raises(ValueError, match="abacus"), testing.cpu_capability("abacus"):
        pass
