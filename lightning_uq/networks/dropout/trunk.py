"""Whether the layers before a network's first dropout can run once for all indices."""

from torch import fx, nn


def is_passed_by_all(network: nn.Module, layer: nn.Module) -> bool:
    """Whether everything that the output knows of the input has passed the first call of ``layer``.

    It has not where a residual connection bypasses the layer, or where the output's shape is taken from the input. A network that torch.fx
    cannot trace has not either.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 4), nn.Dropout(), nn.Linear(4, 3))
        >>> is_passed_by_all(network, network[1])
        True
    """
    try:
        graph = fx.symbolic_trace(network).graph
    except Exception:  # a user's forward may raise anything when it gets a stand-in for a tensor
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
