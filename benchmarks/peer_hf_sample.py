"""The peer of part `sample`: transformers' generate on one batch. Runs in its own environment, prints one JSON line."""

from __future__ import annotations

import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True, help="JSON file: list of lists of token ids, one a sequence")
    parser.add_argument("--passes", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()

    with open(options.prompts) as file:
        rows = torch.tensor(json.load(file))
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    seconds = []
    for seed in range(options.passes):
        torch.manual_seed(seed)
        started = time.perf_counter()
        with torch.inference_mode():
            result = model.generate(
                input_ids=rows,
                attention_mask=torch.ones_like(rows),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=options.new_tokens,
                max_new_tokens=options.new_tokens,
                pad_token_id=0,
            )
        seconds.append(time.perf_counter() - started)
        assert result.shape[1] == rows.shape[1] + options.new_tokens
    print(json.dumps({"seconds": seconds, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
