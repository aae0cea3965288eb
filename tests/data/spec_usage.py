"""The usage example of the classic trainer's guide; only its imports are ours."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_fast import PPOTrainer, RewardModel, ValueModel

# Load models
policy_model = AutoModelForCausalLM.from_pretrained("gpt2")
tokenizer = AutoTokenizer.from_pretrained("gpt2")
tokenizer.pad_token = tokenizer.eos_token

# Create reward and value models
base_model_for_reward = AutoModelForCausalLM.from_pretrained("gpt2")
reward_model = RewardModel(base_model_for_reward, hidden_size=768)

base_model_for_value = AutoModelForCausalLM.from_pretrained("gpt2")
value_model = ValueModel(base_model_for_value, hidden_size=768)

# Initialize PPO trainer
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ppo_trainer = PPOTrainer(
    policy_model=policy_model,
    value_model=value_model,
    reward_model=reward_model,
    tokenizer=tokenizer,
    device=device,
    learning_rate=1e-5,
    clip_epsilon=0.2,
    kl_penalty=0.1,
    gamma=0.99,
    gae_lambda=0.95,
)

# Training prompts
prompts = [
    "What is artificial intelligence?",
    "How can I be helpful?",
    "Explain machine learning",
]

# Train
results = ppo_trainer.train(
    prompts=prompts,
    num_steps=100,
    batch_size=4,
    num_epochs_per_batch=4,
    max_length=150,
    temperature=1.0,
    checkpoint_dir="./checkpoints",
    checkpoint_freq=10,
)

# View results
print(f"Final avg reward: {results['final_stats']['avg_reward']:.4f}")
print(f"Final KL divergence: {results['final_stats']['avg_kl_divergence']:.4f}")

# Get statistics
stats = ppo_trainer.get_statistics()
print(stats)
