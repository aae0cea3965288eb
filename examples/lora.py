"""PPO with LoRA: adapters of a few weights are trained, the model itself stays as it is.

    python examples/lora.py

SmolLM2-135M learns to continue reviews kindly (VADER's sentiment, -1 to 1). Expect the mean reward
on held-out openings to rise from about 0.23 to about 0.66, in some 10 minutes of processor time.
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro
from peft import PeftModel

from ppo_fast import PPO, PPOConfig, evaluate
from ppo_fast.demo.smollm2 import load_smollm2
from ppo_fast.demo.task import load_prompts, positivity
from ppo_fast.exports.export import export_policy
from ppo_fast.models.lora import with_lora


def main(num_steps: int = 16, batch_size: int = 32, rank: int = 8) -> None:
    # for a model of your own: AutoModelForCausalLM.from_pretrained("org/name") and AutoTokenizer
    model, tokenizer = load_smollm2()
    config = PPOConfig(
        learning_rate=2e-3,  # of adapters, ten times that of whole weights
        value_learning_rate=1e-3,
        kl_penalty=0.02,
        num_epochs=2,
        num_minibatches=2,
        critic="head",
        num_layers_unfrozen=4,  # no adapters below: the lower layers are computed once a step
        max_length=24,
    )
    torch.manual_seed(0)  # new adapters are drawn from it
    policy = with_lora(model, rank, config.num_layers_unfrozen)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    print(f"{trained:,} of {sum(p.numel() for p in policy.parameters()):,} weights are trained")
    ppo = PPO(policy, tokenizer, positivity, config=config)
    prompts, held_out = load_prompts()
    before = evaluate(ppo, held_out, samples_per_prompt=4)["reward"]
    ppo.train(prompts, num_steps=num_steps, batch_size=batch_size)
    after = evaluate(ppo, held_out, samples_per_prompt=4)["reward"]
    print(f"mean reward: {before:.2f} before, {after:.2f} after")

    folder = Path("runs/lora/adapter")
    export_policy(policy, tokenizer, folder, adapter_only=True)
    loaded = PeftModel.from_pretrained(load_smollm2()[0], folder)  # peft, without ppo_fast
    ids = tokenizer(held_out[0], return_tensors="pt").input_ids
    difference = (loaded.eval()(ids).logits - policy(ids).logits).abs().max()
    print(f"{folder} loads with peft; the largest difference of a logit is {difference:.1e}")


if __name__ == "__main__":
    tyro.cli(main)
