"""Native products against exact arithmetic and against their own plain PyTorch code."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from instruction_sets import threads, using, with_each

from quire.weights.dense import DenseProduct
from quire.weights.formats import ByChannel, Dense, Grouped
from quire.weights.grouped import BLOCK, GroupedProduct
from quire.weights.int8 import Int8Product
from quire.weights.linear import Product, make_product

ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 48, 97, 193]
OUTS = [1, 15, 16, 17, 100]
SIZES = pytest.mark.parametrize(
    ("outs", "ins"),
    [*((outs, 36) for outs in OUTS), (1, 4), (16, 64), (100, 516), (15, 2052), (17, 4104)],
)
# Half a unit in the last place, relative: what rounding to a dtype costs.
HALF_UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


ISAS = pytest.mark.usefixtures("isa")


class Call:
    """Inputs of a product: ``x``, perhaps as columns of a wider matrix, a bias and a residual."""

    def __init__(self, seed: int, rows: int, ins: int, outs: int, dtype: torch.dtype) -> None:
        # Every other case is a view whose rows lie further apart.
        wide = torch.randn(rows, ins + 12).to(dtype) if seed % 2 else None
        self.x = torch.randn(rows, ins).to(dtype) if wide is None else wide[:, 4 : ins + 4]
        self.bias = torch.randn(outs).to(dtype) if seed % 3 else None
        self.add = torch.randn(rows, outs).to(dtype) if seed % 4 else None

    def __call__(self, product: Product) -> Tensor:
        x, add = self.x.clone(), None if self.add is None else self.add.clone()
        found = product(self.x, self.bias, self.add)
        assert found.shape == (len(x), product.outs)
        assert found.dtype == x.dtype
        assert torch.equal(self.x, x)
        assert add is None or torch.equal(add, self.add)
        return found

    def exact(self, weight: Tensor) -> Tensor:
        """The result in float64."""
        return self._with(self.x.double() @ weight.double().T, lambda t: t.double())

    def magnitude(self, weight: Tensor) -> Tensor:
        """The same with every term's absolute value: what roundings are relative to."""
        return self._with(self.x.double().abs() @ weight.double().abs().T, lambda t: t.abs())

    def _with(self, product: Tensor, change: object) -> Tensor:
        for part in (self.bias, self.add):
            if part is not None:
                product = product + change(part)  # type: ignore[operator]
        return product

    def check(self, product: Product, exact: Tensor, slack: Tensor) -> None:
        """``slack``: absolute error allowed before the result is rounded to its dtype."""
        self.compare(product, exact, slack + HALF_UNIT[self.x.dtype] * (exact.abs() + slack))

    def compare(self, product: Product, expected: Tensor, allowed: Tensor) -> None:
        for name, found in with_each(lambda: self(product)).items():
            error = (found.double() - expected).abs()
            worst = (error / allowed.clamp(min=1e-45)).max() if len(error) else 0.0
            assert (error <= allowed).all(), f"{name}: {worst:.2f} times what is allowed"

    def plainly(self, product: Product) -> Tensor:
        """The result of the product's own PyTorch code."""
        with using("plain"):
            return self(product).double()


def sums(ins: int) -> float:
    """Relative error of a float32 sum of ``ins`` products.

    Random roundings of 2^-24 add up like the square root of their number; four times that.
    """
    return 4 * 2**-24 * (ins + 2) ** 0.5


def dense(outs: int, ins: int, dtype: torch.dtype) -> DenseProduct:
    weight = torch.randn(outs, ins).to(dtype)
    product = DenseProduct.make(weight)
    assert product.values.dim() == 4, "packed"
    assert torch.equal(product.unpacked(), weight)
    return product


@DTYPES
@SIZES
def test_dense(dtype: torch.dtype, outs: int, ins: int) -> None:
    torch.manual_seed(ins + outs)
    product = dense(outs, ins, dtype)
    weight = product.unpacked()
    for seed, rows in enumerate(ROWS):
        call = Call(seed + ins + outs, rows, ins, outs, dtype)
        magnitude = call.magnitude(weight)
        slack = sums(ins) * magnitude
        call.check(product, call.exact(weight), slack)
        # PyTorch's own code rounds before the residual and after it.
        allowed = 2 * slack + 4 * HALF_UNIT[dtype] * magnitude
        call.compare(product, call.plainly(product), allowed)


@ISAS
@DTYPES
def test_dense_looks_rows_up(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    product = dense(37, 20, dtype)
    ids = torch.tensor([0, 36, 15, 16, 16, 31, 32, 3])
    assert torch.equal(product.rows(ids), product.unpacked()[ids])
    assert product.rows(ids[:0]).shape == (0, 20)


def test_dense_that_cannot_be_packed() -> None:
    """Inputs that do not fill four numbers stay with PyTorch."""
    torch.manual_seed(0)
    weight = torch.randn(5, 18)
    product = DenseProduct.make(weight)
    x = torch.randn(3, 18)
    torch.testing.assert_close(product(x, None, None), x @ weight.T)
    assert torch.equal(product.rows(torch.tensor([4, 0])), weight[[4, 0]])


@ISAS
@DTYPES
@pytest.mark.parametrize("kind", ["dense", "int8", "int4", "int4+offsets", "8 bits"])
def test_residual_is_the_input(dtype: torch.dtype, kind: str) -> None:
    """``add`` may be ``x`` itself, which then stays as it is."""
    torch.manual_seed(3)
    product = some_product(kind, 64, 64, dtype, invariant=False)
    for rows in (3, 20):
        x = torch.randn(rows, 64).to(dtype)
        before = x.clone()
        found = product(x, None, x)
        assert torch.equal(x, before)
        assert torch.equal(found, product(x, None, before.clone()))
        assert not torch.equal(found, product(x, None, None))


def by_channel(outs: int, ins: int) -> ByChannel:
    values = torch.randint(-128, 128, (outs, ins), dtype=torch.int8)
    values[outs // 2] = 0
    values[0] = -128  # sums as large as they can get
    scales = torch.rand(outs) + 0.1
    scales[::3] *= -1
    return ByChannel(values, scales / 50)


@DTYPES
@SIZES
def test_int8(dtype: torch.dtype, outs: int, ins: int) -> None:
    torch.manual_seed(ins + outs)
    matrix = by_channel(outs, ins)
    product = Int8Product.make(matrix, dtype)
    assert product.values.dim() == 4, "packed"
    for seed, rows in enumerate(ROWS):
        call = Call(seed + ins + outs, rows, ins, outs, dtype)
        expected = call.plainly(product)
        # A number in the middle of two levels may become either (half the largest of a row is at
        # 63.5, and bfloat16 numbers meet it often); a level is computed to 127 * 2^-22.
        wide = call.x.float()
        scale = wide.abs().amax(1, keepdim=True) / 127
        place = wide.abs() / scale
        middle = ((place - place.floor() - 0.5).abs() < 127 * 2**-22).double()
        either = (middle @ matrix.values.double().abs().T) * scale * matrix.scales.abs()
        magnitude = call.magnitude(matrix.dequantise())
        rounded = 1.1 * 2 * HALF_UNIT[dtype] * (expected.abs() + either)
        call.compare(product, expected, either + rounded + 2**-20 * magnitude)


@DTYPES
@SIZES
def test_int8_is_exact_in_the_integers(dtype: torch.dtype, outs: int, ins: int) -> None:
    """Activations that are levels already: only the epilogue rounds."""
    torch.manual_seed(ins + outs)
    matrix = by_channel(outs, ins)
    product = Int8Product.make(matrix, dtype)
    for seed, rows in enumerate(ROWS):
        call = Call(seed, rows, ins, outs, dtype)
        call.x.copy_(torch.randint(-127, 128, (rows, ins)) / 16)
        call.x[:, 0] = 127 / 16
        if rows > 3:
            call.x[3] = 0  # a row without any level
            call.x[2] = -127 / 16  # and the largest sum
        # The integer becomes a float, is scaled twice, and two numbers are added.
        slack = 5 * 2**-24 * call.magnitude(matrix.dequantise())
        call.check(product, call.exact(matrix.dequantise()), slack)


@ISAS
@DTYPES
def test_int8_rows_of_zeros_and_tiny_numbers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    product = Int8Product.make(by_channel(17, 36), dtype)
    assert not product(torch.zeros(3, 36, dtype=dtype), None, None).any()
    bias = torch.randn(17).to(dtype)
    assert torch.equal(product(torch.zeros(1, 36, dtype=dtype), bias, None)[0], bias)
    tiny = torch.full((1, 36), 1e-30, dtype=dtype)
    with using("plain"):
        expected = product(tiny, None, None)
    torch.testing.assert_close(product(tiny, None, None), expected, rtol=2**-7, atol=1e-34)


def grouped(outs: int, ins: int, bits: int, group: int, *, offsets: bool) -> Grouped:
    codes = torch.randint(0, 2**bits, (outs, ins), dtype=torch.uint8)
    scales = (torch.rand(outs, ins // group) + 0.1) / 2**bits
    scales[::2, ::2] *= -1
    scales[outs // 2] = 0
    if outs > 1:
        codes[1] = 2 ** (bits - 1)  # weights of zero
    return Grouped(
        codes, scales, torch.randn(outs, ins // group) / 4 if offsets else None, bits, group
    )


@DTYPES
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("offsets", [False, True], ids=["symmetric", "offsets"])
@pytest.mark.parametrize("invariant", [False, True], ids=["few", "invariant"])
@pytest.mark.parametrize(
    ("group", "ins"), [(8, 40), (16, 16), (16, 272), (32, 160), (64, 64), (64, 576), (128, 2048)]
)
def test_grouped(
    dtype: torch.dtype, bits: int, offsets: bool, invariant: bool, group: int, ins: int
) -> None:
    for case, outs in enumerate(OUTS if ins < 500 else OUTS[3:4]):
        torch.manual_seed(ins + outs)
        matrix = grouped(outs, ins, bits, group, offsets=offsets)
        product = GroupedProduct.make(matrix, invariant=invariant)
        weight = matrix.dequantise().double()
        codes = replace(matrix, offsets=None).dequantise()
        for seed, rows in enumerate(ROWS[1 + case % 3 :: 3]):
            call = Call(seed + ins + outs, rows, ins, outs, dtype)
            magnitude = call.magnitude(weight)
            slack = sums(ins) * magnitude
            if dtype == torch.bfloat16 and not invariant and rows <= 32 and group % BLOCK == 0:
                # Few rows are rounded to the nearest level of their blocks.
                slack += 1.001 * half_steps(call.x).double() @ codes.double().abs().T
            elif dtype == torch.bfloat16:  # many rows multiply weights that were rounded
                slack += 1.01 * 2**-8 * magnitude
            call.check(product, call.exact(weight), slack)
            allowed = 2 * slack + 5 * HALF_UNIT[dtype] * magnitude
            call.compare(product, call.plainly(product), allowed)


def half_steps(x: Tensor) -> Tensor:
    """Half of what lies between two levels, for each input ``[rows, in]``."""
    most = x.float().unflatten(1, (-1, BLOCK)).abs().amax(2)
    return (most / 254).repeat_interleave(BLOCK, 1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("offsets", [False, True], ids=["symmetric", "offsets"])
@pytest.mark.parametrize(("group", "ins"), [(32, 32), (32, 160), (64, 576), (128, 2048)])
def test_few_rows_are_exact_in_the_integers(bits: int, offsets: bool, group: int, ins: int) -> None:
    """Activations that are levels already, up to a power of two: only sums in float32 round."""
    for case, outs in enumerate(OUTS):
        torch.manual_seed(ins + outs)
        matrix = grouped(outs, ins, bits, group, offsets=offsets)
        product = GroupedProduct.make(matrix)
        weight = matrix.dequantise()
        for rows in (*range(1 + case % 2, 9, 2), 31 + case % 2):
            call = Call(rows, rows, ins, outs, torch.bfloat16)
            levels = torch.randint(-127, 128, (rows, ins // BLOCK, BLOCK))
            levels[..., 5] = 127
            levels[rows - 1, 0] = 0  # a block without any level
            levels[0, -1] = -127  # and the largest sum
            steps = 2.0 ** torch.randint(-9, 3, (rows, ins // BLOCK, 1))
            call.x.copy_((levels * steps).flatten(1))
            call.check(product, call.exact(weight), sums(ins) * call.magnitude(weight))


@ISAS
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("invariant", [True, False])
def test_grouped_without_rows(bits: int, invariant: bool) -> None:
    matrix = grouped(17, 64, bits, 32, offsets=True)
    product = GroupedProduct.make(matrix, invariant=invariant)
    assert product(torch.empty(0, 64).bfloat16(), None, None).shape == (0, 17)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize(("outs", "ins", "group"), [(1, 16, 16), (17, 96, 32), (48, 40, 8)])
def test_grouped_round_trip(bits: int, offsets: bool, outs: int, ins: int, group: int) -> None:
    torch.manual_seed(0)
    matrix = grouped(outs, ins, bits, group, offsets=offsets)
    again = GroupedProduct.make(matrix).unpacked()
    assert torch.equal(again.codes, matrix.codes)
    assert torch.equal(again.scales, matrix.scales)
    assert (again.offsets is None) == (matrix.offsets is None)
    assert again.offsets is None or torch.equal(again.offsets, matrix.offsets)
    assert (again.bits, again.group, again.shape) == (bits, group, (outs, ins))


def some_product(kind: str, outs: int, ins: int, dtype: torch.dtype, *, invariant: bool) -> Product:
    if kind == "dense":
        return make_product(Dense(torch.randn(outs, ins)), dtype, invariant=invariant)
    if kind == "int8":
        return make_product(by_channel(outs, ins), dtype, invariant=invariant)
    bits = 8 if kind == "8 bits" else 4
    matrix = grouped(outs, ins, bits, 32, offsets="offsets" in kind)
    return make_product(matrix, dtype, invariant=invariant)


KINDS = pytest.mark.parametrize("kind", ["dense", "int8", "int4", "int4+offsets", "8 bits"])


@ISAS
@DTYPES
@KINDS
@pytest.mark.parametrize(("outs", "ins"), [(17, 32), (100, 1088)])
def test_a_row_does_not_depend_on_the_others(
    dtype: torch.dtype, kind: str, outs: int, ins: int
) -> None:
    """Bit for bit, for any number of rows and any place among them."""
    torch.manual_seed(1)
    product = some_product(kind, outs, ins, dtype, invariant=True)
    x = torch.randn(200, ins).to(dtype)
    bias, add = torch.randn(outs).to(dtype), torch.randn(200, outs).to(dtype)
    whole = product(x, bias, add)
    for rows in ROWS[1:]:
        for first in (0, 1, 200 - rows):
            part = slice(first, first + rows)
            assert torch.equal(product(x[part], bias, add[part]), whole[part])
    order = torch.randperm(200)
    assert torch.equal(product(x[order], bias, add[order]), whole[order])


@ISAS
@DTYPES
@KINDS
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_two_threads(dtype: torch.dtype, kind: str, rows: int) -> None:
    torch.manual_seed(2)
    product = some_product(kind, 200, 320, dtype, invariant=False)
    x = torch.randn(rows, 320).to(dtype)
    one = product(x, None, None)
    with threads(2):
        assert torch.equal(product(x, None, None), one)
