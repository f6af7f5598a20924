"""Computes the pinned draws of draws.rs from the written definition alone (pure Python). Run it by hand to renew them:
`python3 crates/perigee-sampling/tests/reference_draws.py`. It is not part of the test run."""

import math
import struct

MASK = 0xFFFFFFFF


def philox4x32_10(counter, key):
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def draw(logits, temperature, seed, choice, position):
    best = None
    for token, logit in enumerate(logits):
        counter = (choice, position & MASK, position >> 32, token >> 2)
        bits = philox4x32_10(counter, (seed & MASK, seed >> 32))[token & 3]
        u = (bits + 0.5) * 2.0**-32
        score = logit / temperature - math.log(-math.log(u))
        if best is None or score > best[0]:
            best = (score, token)
    return best[1]


row = [float32(token * 37 % 101 / 16) for token in range(1000)]
for choice, first in ((0, 0), (3, 0xFFFFFFFC)):
    print([draw(row, 0.75, 0x0123456789ABCDEF, choice, first + i) for i in range(8)])
