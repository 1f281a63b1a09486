"""Two searches of Lightning that take milliseconds in a user's process, and much longer in a process that has imported all tests."""

import inspect
from functools import cache, partial
from types import SimpleNamespace

from lightning.fabric.utilities import registry
from lightning.pytorch.utilities import model_helpers

# Each Trainer reads the entry points of all installed packages, a few hundred files, which takes ten times as long as all else in its
# constructor. No test installs a package.
registry.entry_points = cache(registry.entry_points)

# Each `load_from_checkpoint` looks for a file of torch among its callers' files. Without `context=0` it also reads these files' lines, and
# for some of them Python searches all modules of a worker, which takes a tenth of a second.
model_helpers.inspect = SimpleNamespace(stack=partial(inspect.stack, context=0))
