"""Import, step, checkpoint and loss need nothing that Windows, or a torch built without its ranks, lacks."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# torch itself is loaded before: it has other files on other platforms. `sys.platform` stays, which it goes on to ask.
ELSEWHERE = """
import os, signal, sys
import numpy, torch, torch._dynamo, torch.distributed
for module in ("fcntl", "grp", "posix", "pwd", "resource", "termios"):
    sys.modules[module] = None
for name in ("fork", "forkpty", "getuid", "kill", "register_at_fork", "sched_getaffinity", "uname"):
    delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGALRM", "alarm"):
    delattr(signal, name)
del torch.distributed.ProcessGroup
torch.distributed.is_available = lambda: False

from gradbalance import ConflictAwarePenalty, Recorder, StatisticalLoss, rules
from gradbalance.report import report

model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 1) for name in ("text", "audio")})
optimizer = torch.optim.AdamW(model.parameters())
optimizer = ConflictAwarePenalty(optimizer, dict(model.items()), rules.ByHand(text=0.5))
loss = StatisticalLoss()
with Recorder(optimizer) as recorder:
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(8, 3)
        loss(model["text"](x) + model["audio"](x), torch.randn(8, 1)).backward()
        optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
report(optimizer)
print(optimizer.coefficients(), recorder.summary().recorded)
"""


def test_a_step_needs_neither_posix_nor_ranks():
    command = [sys.executable, "-W", "error", "-c", ELSEWHERE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "{'text': 0.5, 'audio': 1.0} 3\n", done.stderr
