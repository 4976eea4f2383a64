"""What importing the library needs, loads and says, in a process of its own."""

import subprocess
import sys


SCRIPT = """
import socket, sys
socket.socket.connect = None
import diffusers_ctx, diffusers_ctx.data, diffusers_ctx.evaluation
print({"ot", "matplotlib", "sklearn"} & set(sys.modules))
diffusers_ctx.ComposablePipeline.from_pretrained(diffusers_ctx.embedded_base())
"""


def test_it_needs_no_network_and_nothing_optional_and_says_nothing_of_torchvision():
    result = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "set()" and "torchvision" not in result.stderr
