"""Stream an answer from a running service, and say how it came about.

pip install ./treeline && python examples/client.py "Why is the sky blue?" [host:port]
"""

import sys

from treeline import Client
from treeline.errors import TreelineError
from treeline.v1.generation_pb2 import GenerateChunk

question = sys.argv[1]
server = sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1:50051"

try:
    with Client(server) as client:
        for message in client.generate(messages=[{"role": "user", "content": question}], max_tokens=100, timeout_s=60):
            if isinstance(message, GenerateChunk):
                print(message.text, end="", flush=True)
            else:
                length = message.speculation.mean_accepted_length
                print(f"\n[{message.usage.completion_tokens} tokens, {length:.2f} a step]")
except TreelineError as error:
    sys.exit(f"failed: {error}")
