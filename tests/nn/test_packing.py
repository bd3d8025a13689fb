import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxcompress.nn.packing import pack, packed_size, unpack


@given(st.integers(1, 8), st.integers(1, 70), st.integers(0, 9))
def test_numbers_come_back_and_take_their_bits(bits, count, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (count,), generator=generator).to(torch.uint8)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_size(count, bits)
    assert torch.equal(unpack(packed, bits, count), values)
    # Eight numbers take `bits` bytes; what is left over rounds up once for each field.
    assert packed_size(8 * count, bits) == bits * count


def test_the_layout():
    assert pack(torch.tensor([1, 2, 3, 15]), 4).tolist() == [0x21, 0xF3]
    # 3 bits: the lower two of all, then the highest of all.
    assert pack(torch.tensor([5, 2, 7, 0, 4]), 3).tolist() == [0b00_11_10_01, 0b00, 0b10101]


@pytest.mark.parametrize("bits", [0, 9])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="do not fit a byte"):
        pack(torch.zeros(3), bits)
