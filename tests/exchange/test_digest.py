"""Hashes of tensors: the definition of sum128 in plain integers against every way it is computed, and what it finds."""

from __future__ import annotations

import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from megarubric.exchange import digest
from megarubric.exchange.buckets import BucketError, TensorEntry, WeightDigest
from megarubric.exchange.digest import sum128, sum128_of, tensor_hash
from megarubric.reward import ops

needs_ops = pytest.mark.skipif(not ops.available(), reason="the compiled ops are not there")
BYTES = st.binary(max_size=300)


def by_definition(data: bytes) -> bytes:
    """The docstring of the module, word by word."""
    mask = (1 << 64) - 1
    words = [len(data), *struct.unpack(f"<{-(-len(data) // 8)}Q", data + bytes(-len(data) % 8))]
    a = b = 0
    for i, word in enumerate(words):
        x = (word + i * 0x9E3779B97F4A7C15) & mask
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
        h = x ^ x >> 31
        a, b = (a + h) & mask, (b + (h & 0xFFFFFFFF) * (h >> 32)) & mask
    return struct.pack("<QQ", a, b)


@given(data=BYTES)
def test_every_way_gives_what_the_definition_says(data):
    wanted = by_definition(data)
    assert sum128(data) == wanted
    flat = torch.tensor(list(data), dtype=torch.uint8)
    assert digest._torch_sums(flat).numpy().tobytes() == wanted
    assert sum128_of(flat, [(0, len(data))]) == [wanted]
    assert tensor_hash("sum128", data) == wanted and tensor_hash("xxh3", data) == xxhash.xxh3_128(data).digest()


def test_long_data_goes_through_in_chunks(monkeypatch):
    data = np.random.default_rng(0).bytes(5000)
    wanted = by_definition(data)
    monkeypatch.setattr(digest, "_CHUNK_BYTES", 1024)
    assert sum128(data) == wanted
    assert digest._torch_sums(torch.tensor(list(data), dtype=torch.uint8)).numpy().tobytes() == wanted


@needs_ops
@given(
    sizes=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 900)), max_size=9),
    tile=st.sampled_from([16, 48, 256, 32768]),
    seed=st.integers(0, 99),
)
def test_the_op_on_many_tensors_at_any_offset_and_tile(sizes, tile, seed):
    spans, at = [], 0
    for gap, nbytes in sizes:
        spans.append((at + gap, nbytes))
        at += gap + nbytes
    data = np.random.default_rng(seed).bytes(at + 3)
    table, tiles = digest.digest_table(spans, tile)
    found = ops.weight_digest(torch.frombuffer(bytearray(data), dtype=torch.uint8), table, tiles, tile)
    wanted = [by_definition(data[offset : offset + nbytes]) for offset, nbytes in spans]
    assert [row.numpy().tobytes() for row in found] == wanted


@needs_ops
def test_instruction_sets_and_threads_agree():
    data = torch.from_numpy(np.random.default_rng(1).integers(0, 256, 3_000_001, np.uint8))
    spans = [(0, 2_000_003), (2_000_003, 0), (2_000_003, 999_998)]
    wanted = [sum128(data[o : o + n].numpy().data) for o, n in spans]
    before, threads = ops.cpu_instruction_set(), torch.get_num_threads()
    try:
        for isa in ("baseline", "avx2", "avx512"):
            if ops.use_cpu_instruction_set(isa):
                for n in (1, 3):
                    torch.set_num_threads(n)
                    assert sum128_of(data, spans) == wanted, isa
    finally:
        ops.use_cpu_instruction_set(before)
        torch.set_num_threads(threads)


def test_without_the_compiled_ops_the_same_comes_out(monkeypatch):
    data = torch.arange(500, dtype=torch.int64).view(torch.uint8)
    spans = [(0, 17), (64, 1000), (3, 0)]
    wanted = [by_definition(bytes(data[o : o + n].tolist())) for o, n in spans]
    monkeypatch.setattr(ops, "available", lambda: False)
    assert sum128_of(data, spans) == wanted


def test_a_process_without_torch_does_not_import_it():
    code = (
        "import sys; from megarubric.exchange.digest import tensor_hash\n"
        "print(tensor_hash('sum128', bytes(range(99))).hex(), 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == [by_definition(bytes(range(99))).hex(), "False"]


@pytest.mark.parametrize("span", [(-1, 4), (0, -4), (90, 11), (101, 0)])
def test_a_span_outside_the_buffer_is_refused(span):
    with pytest.raises(ValueError, match="leave a buffer of 100"):
        sum128_of(torch.zeros(100, dtype=torch.uint8), [(0, 5), span])


@needs_ops
@pytest.mark.parametrize(
    ("row", "tiles", "reason"),
    [
        ([-1, 16, 0], 1, "leaves the buffer"),
        ([96, 16, 0], 1, "leaves the buffer"),
        ([0, 16, 1], 1, "first tiles do not add up"),
        ([0, 16, 0], 2, "tiles do not add up"),
    ],
)
def test_the_op_refuses_a_table_that_lies(row, tiles, reason):
    with pytest.raises(RuntimeError, match=reason):
        ops.weight_digest(torch.zeros(100, dtype=torch.uint8), torch.tensor([row]), tiles, 16)


@given(data=st.binary(min_size=1, max_size=200), at=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_changed_byte_changes_the_hash(data, at, flip):
    """Certain, not likely: one word changes, and mix is a bijection."""
    changed = bytearray(data)
    changed[at % len(data)] ^= flip
    assert sum128(bytes(changed)) != sum128(data)


@given(words=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=20, unique=True), data=st.data())
def test_moved_swapped_and_cut_words_change_the_hash(words, data):
    whole = struct.pack(f"<{len(words)}Q", *words)
    i, j = data.draw(st.lists(st.integers(0, len(words) - 1), min_size=2, max_size=2, unique=True))
    swapped = list(words)
    swapped[i], swapped[j] = words[j], words[i]
    changes = {
        "swapped": struct.pack(f"<{len(words)}Q", *swapped),
        "rotated": whole[8:] + whole[:8],
        "shorter": whole[:-1],
        "longer": whole + b"\0",
        "doubled": whole + whole,
        "moved": b"\0" + whole[:-1],
    }
    hashes = {sum128(whole)} | {sum128(changed) for changed in changes.values() if changed != whole}
    assert len(hashes) == 1 + len({changed for changed in changes.values() if changed != whole})


def test_zeros_and_every_flipped_bit_are_told_apart():
    """Lengths of zeros, and all one-bit changes of 1 KiB: no two hashes alike, in either half."""
    hashes = [sum128(bytes(n)) for n in range(600)]
    data = np.zeros(1024, np.uint8)
    for bit in range(8 * 1024):
        data[bit // 8] ^= 1 << bit % 8
        hashes.append(sum128(data.data))
        data[bit // 8] ^= 1 << bit % 8
    for part in (slice(0, 8), slice(8, 16)):
        assert len({h[part] for h in hashes}) == len(hashes)


def test_a_checksum_says_which_hash_it_is_made_of():
    entry, data = TensorEntry("a", "uint8", (3,), 0, 3), b"abc"
    made = {}
    for kind in ("xxh3", "sum128"):
        whole = WeightDigest(kind)
        whole.add(entry, data)
        by_hash = WeightDigest(kind)
        by_hash.add_hash(entry, tensor_hash(kind, data))
        assert whole.hexdigest() == by_hash.hexdigest()
        made[kind] = whole
    assert len(made["xxh3"].hexdigest()) == 32
    assert made["sum128"].hexdigest().startswith("sum128:") and len(made["sum128"].hexdigest()) == 39
    with pytest.raises(BucketError, match="a sum128 digest does not go into one of xxh3"):
        made["xxh3"].update(made["sum128"])
    with pytest.raises(BucketError, match="arrived twice"):
        made["sum128"].add(entry, data)
