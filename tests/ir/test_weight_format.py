"""Weight formats as values: their text, their sizes, and what is refused."""

import dataclasses

import pytest
import torch

from moeopt.errors import UsageError
from moeopt.ir.bank_format import BankFormat, MatrixFormat
from moeopt.ir.weight_format import (
    FLOAT32,
    FORMATS,
    FP8_BLOCK128,
    INT4_ASYMMETRIC32,
    INT4_BLOCK32,
    INT8_CHANNEL,
    MXFP4,
    WeightFormat,
)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_survives_its_text(name):
    assert WeightFormat.decode(FORMATS[name].encode()) == FORMATS[name]


def test_bits_and_bytes():
    assert INT8_CHANNEL.nbytes((64, 256)) == 64 * 256 + 64 * 4
    assert INT4_BLOCK32.nbytes((64, 96)) == 64 * 48 + 64 * 3 * 2
    assert INT4_ASYMMETRIC32.nbytes((64, 96)) == 64 * 48 + 64 * 3 * 3
    assert FP8_BLOCK128.nbytes((192, 300)) == 192 * 300 + 2 * 3 * 4
    assert MXFP4.bits_per_weight((64, 320)) == 4.25
    assert FLOAT32.bits_per_weight((3, 5)) == 32 and FLOAT32.nbytes((3, 5)) == 60
    assert INT4_BLOCK32.nbytes((1, 33)) == 17 + 2 * 2
    assert (INT4_BLOCK32.bits, INT8_CHANNEL.bits, FLOAT32.bits) == (4, 8, 32)
    assert INT4_BLOCK32.code_dtype == torch.uint8 and MXFP4.scale_dtype == torch.uint8


def test_words_for_a_report():
    assert str(INT8_CHANNEL) == "int8 (int8, one float32 scale per channel)"
    assert str(FP8_BLOCK128) == "fp8 (e4m3, one float32 scale per 128 x 128)"
    assert str(INT4_ASYMMETRIC32).endswith("per 1 x 32, zero points)")
    assert str(FLOAT32) == "float32"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"codes": "int3"}, "WeightFormat.codes is 'int3'; it must be one of int8"),
        ({"scale": "int8"}, "WeightFormat.scale is 'int8'"),
        ({"packing": "odd"}, "WeightFormat.packing is 'odd'"),
        ({"block": (1, 0)}, "it must be (rows, columns), each a positive integer or None"),
        ({"block": (1, True)}, "it must be (rows, columns)"),
        ({"block": (1, 1 << 40)}, "it must be (rows, columns)"),
        ({"block": (1,)}, "it must be (rows, columns)"),
        ({"codes": "e4m3", "symmetric": False}, "codes 'e4m3' are floats and have no zero point"),
        ({"symmetric": 0}, "symmetric True or False"),
    ],
)
def test_a_field_that_means_nothing(fields, text):
    with pytest.raises(UsageError) as err:
        dataclasses.replace(INT8_CHANNEL, **fields)
    assert text in str(err.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not a WeightFormat"),
        ("3", "it lacks a name or codes"),
        ('{"name": "x"}', "it lacks a name or codes"),
        ('{"name": "x", "codes": "int8", "colour": 1}', "no field 'colour': written by a newer moeopt?"),
        ('{"name": "x", "codes": ["int8"]}', "WeightFormat.codes is ['int8']; it must be a word"),
        ('{"name": "x", "codes": "int8", "block": "11"}', "WeightFormat.block is '11'"),
        ('{"name": "x", "codes": "int8", "block": [[1], 2]}', "WeightFormat.block is ([1], 2)"),
    ],
)
def test_text_from_elsewhere(text, why):
    with pytest.raises(UsageError) as err:
        WeightFormat.decode(text)
    assert why in str(err.value)


BANK = BankFormat(
    4, (MatrixFormat(INT4_BLOCK32, (10, 64)),) * 2, MatrixFormat(INT8_CHANNEL, (64, 10), stacked=True)
)  # fmt: skip


def test_a_bank_format_survives_its_text():
    assert BankFormat.decode(BANK.encode()) == BANK
    assert BANK.nbytes() == 4 * (2 * INT4_BLOCK32.nbytes((10, 64)) + INT8_CHANNEL.nbytes((64, 10)))
    assert str(BANK).startswith("4 experts in int4 (uint4") and " and int8 (" in str(BANK)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"experts":4', '"experts":0'),
        ('"experts":4', '"experts":true'),
        ('"experts":4', f'"experts":{1 << 50}'),
        ('"shape":[10,64]', '"shape":[10]'),
        ('"shape":[10,64]', '"shape":[10,-1]'),
        ('"shape":[10,64]', '"shape":[10,1e3]'),
        ('"stacked":true', '"stacked":1'),
        ('"w_in"', '"w_on"'),
        ('"w_out":{', '"w_out":{"more":1,'),
        ('"codes":"int8"', '"codes":"int9"'),
    ],
)
def test_a_bank_format_from_elsewhere(old, new):
    text = BANK.encode()
    assert old in text
    with pytest.raises(UsageError, match="not a BankFormat"):
        BankFormat.decode(text.replace(old, new))
    with pytest.raises(UsageError, match="not a BankFormat"):
        BankFormat.decode('{"experts":4,"w_in":[],"w_out":{}}')
