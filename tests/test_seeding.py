import itertools
import os
import subprocess
import sys

from rolltune.seeding import derive_seed

PINNED = 134958091198789031


def test_is_the_same_on_every_machine_and_in_every_process():
    # Pinned: a change would change the samples of every resumed run.
    assert derive_seed(0, 1, "sample", "gsm8k/train/7", 3) == PINNED
    code = "from rolltune.seeding import derive_seed; print(derive_seed(0, 1, 'sample', 'gsm8k/train/7', 3))"
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": hash_seed}
        )
        assert int(done.stdout) == PINNED, done.stderr


def test_every_part_and_its_place_matter():
    parts = list(itertools.product((0, 1, 10, 11), ("a", "ab", "b"), (0, 1, 2)))
    seeds = (
        {derive_seed(*p) for p in parts} | {derive_seed(*p[::-1]) for p in parts} | {derive_seed(*p[:2]) for p in parts}
    )
    assert len(seeds) == len({*parts, *(p[::-1] for p in parts), *(p[:2] for p in parts)})
    assert derive_seed("ab", "c") != derive_seed("a", "bc") != derive_seed("abc")


def test_has_63_bits_and_uses_them():
    seeds = [derive_seed(i) for i in range(2000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    for bit in range(63):
        ones = sum(seed >> bit & 1 for seed in seeds)
        assert 850 < ones < 1150, bit  # 6.7 standard deviations
