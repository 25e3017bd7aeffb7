#!/usr/bin/env bash
# torch 2.13.0, CPU without AMX: torch.set_float32_matmul_precision("medium") (the same as allowing bfloat16 in
# torch.backends.mkldnn.matmul.fp32_precision) makes F.scaled_dot_product_attention several times slower for short sequences and
# for one new token against a cache, while linear layers stay exact and become faster: such a processor never uses the permission
# to round, but the many small products inside the fused attention go to oneDNN one by one. Results are the same to rounding.
#
# Seen, one thread: 128 texts of 16 tokens, 12 heads of 64: 4.6 ms "highest", 41 ms "medium", 8.9 times; one token against 150
# cached ones, 8 rows, 9 heads of 64: 17 times; a linear layer: "medium" is 0.4 times.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import sys
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(1)
if torch.cpu._is_amx_tile_supported():
    sys.exit("this processor has AMX, which does use the permission: nothing to see here")


def seconds(work, repeats=30):
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def ratio(work):
    """(how many times as long "medium" takes, the largest difference of the results)"""
    found = {}
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        found[precision] = seconds(work), work()
    return found["medium"][0] / found["highest"][0], (found["medium"][1] - found["highest"][1]).abs().max().item()


with torch.inference_mode():
    short = [torch.randn(128, 12, 16, 64) for _ in range(3)]
    query, cached = torch.randn(8, 9, 1, 64), [torch.randn(8, 9, 150, 64) for _ in range(2)]
    x, weight = torch.randn(2048, 576), torch.randn(1536, 576)
    cases = {
        "short texts": ratio(lambda: F.scaled_dot_product_attention(*short, is_causal=True)),
        "one token, a cache": ratio(lambda: F.scaled_dot_product_attention(query, *cached)),
        "linear layer": ratio(lambda: F.linear(x, weight)),
    }
print(f"torch {torch.__version__}: " + "; ".join(f"{name}: {r:.1f} times as long, results differ by {d:.0e}"
                                                 for name, (r, d) in cases.items()))
same = all(d < 1e-3 for _, d in cases.values())
if not (same and cases["short texts"][0] > 2 and cases["one token, a cache"][0] > 2):
    sys.exit("this has changed")
PY
