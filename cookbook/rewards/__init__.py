"""What a completion is worth: ready rewards, rewards of one's own, and calling either under a time limit.

Importing this needs the standard library only; what a reward needs is imported when it is first used.
"""

from cookbook.rewards.load import load_reward, spec_problem
from cookbook.rewards.records import LoadedReward, Reward, RewardFunction
from cookbook.rewards.scoring import dry_run, score

__all__ = ["LoadedReward", "Reward", "RewardFunction", "dry_run", "load_reward", "score", "spec_problem"]
