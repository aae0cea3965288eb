"""PPO against a reward that a server computes: JSON over HTTP, one request a batch.

    python examples/http_reward.py

The server, here a thread of this script, scores how kindly reviews go on. Expect the mean reward to
rise from about 0.18 (the first three steps) to 0.42 (the last three) in 3 minutes on two cores.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import tyro

from ppo_fast import PPO
from ppo_fast.demo.run import demo_config
from ppo_fast.demo.smollm2 import load_smollm2
from ppo_fast.demo.task import load_prompts, positivity
from ppo_fast.rewards import HTTPReward


class Scores(BaseHTTPRequestHandler):
    """Answers {"prompts": [...], "completions": [...]} with {"scores": [...]}."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        scores = positivity(asked["prompts"], asked["completions"])
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"scores": scores}).encode())

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def main(num_steps: int = 12, batch_size: int = 32) -> None:
    model, tokenizer = load_smollm2()
    prompts, _ = load_prompts()
    with ThreadingHTTPServer(("127.0.0.1", 0), Scores) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reward = HTTPReward(f"http://127.0.0.1:{server.server_port}/score", timeout=10)
        ppo = PPO(model, tokenizer, reward, config=demo_config(seed=0))
        result = ppo.train(prompts, num_steps=num_steps, batch_size=batch_size)
        server.shutdown()
    rewards = result["training_history"]["mean_rewards"]
    first, last = rewards[:3], rewards[-3:]
    print(f"mean reward: {sum(first) / len(first):+.2f} -> {sum(last) / len(last):+.2f}")


if __name__ == "__main__":
    tyro.cli(main)
