"""The Neural Testbed in the comparison: its agents, and the divergence that judges them."""

from lightning_uq.compare.testbed.agents import (
    AGENTS,
    DEFAULT_AGENTS,
    NUM_MEMBERS,
    AgentSetting,
    agent_network,
    agent_setting,
    num_epochs,
)
from lightning_uq.compare.testbed.divergence import (
    NUM_INDICES,
    accuracy_and_calibration,
    divergences,
    model_log_likelihood,
)
from lightning_uq.compare.testbed.epinet import epinet_for_resnet, epinet_for_testbed

__all__ = [
    "AGENTS",
    "DEFAULT_AGENTS",
    "NUM_INDICES",
    "NUM_MEMBERS",
    "AgentSetting",
    "accuracy_and_calibration",
    "agent_network",
    "agent_setting",
    "divergences",
    "epinet_for_resnet",
    "epinet_for_testbed",
    "model_log_likelihood",
    "num_epochs",
]
