"""Whether the layers before a network's first dropout can run once for all indices."""

import copy

from torch import fx, nn


def is_passed_by_all(network: nn.Module, layer: nn.Module) -> bool:
    """Whether all information about the input passes through the first call of ``layer`` before it reaches the output.

    It is False if a residual connection bypasses the layer, or if the output's shape depends on the input's. It is also False for a network that torch.fx
    cannot trace, and for one with hooks on a module with submodules, since tracing would call the hooks, which may store its values.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 4), nn.Dropout(), nn.Linear(4, 3))
        >>> is_passed_by_all(network, network[1])
        True
    """
    if any(
        module._forward_hooks or module._forward_pre_hooks for module in network.modules() if any(module.children())
    ):
        return False
    try:
        graph = fx.symbolic_trace(_stand_in(network)).graph
    except Exception:  # a user's forward may raise anything for a proxy of a tensor
        return False
    names = {name for name, module in network.named_modules(remove_duplicate=False) if module is layer}
    first = next((node for node in graph.nodes if node.op == "call_module" and node.target in names), None)
    if first is None:
        return False
    seen: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            return False
        if node not in seen and node is not first:
            seen.add(node)
            waiting.extend(node.all_input_nodes)
    return True


def _stand_in(network: nn.Module) -> nn.Module:
    """A copy with the same tensors, so that a forward that stores values does not store tracing's proxies in the original."""
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, tensors)
