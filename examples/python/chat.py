#!/usr/bin/env python3
"""Asks a nibble server one question and prints the answer as it comes.

Make the stubs once, from the root of the repository:

    pip install grpcio grpcio-tools
    python -m grpc_tools.protoc -I proto --python_out=stubs --grpc_python_out=stubs \
        proto/nibble/inference/v1/inference.proto

    python examples/python/chat.py --stubs stubs "Why is the sky blue?"

A server that speaks TLS: --ca FILE, who signs its certificate. One that asks for a key: put it into
NIBBLE_API_KEY.
"""

import argparse
import os
import sys

import grpc


def connect(server, ca):
    if not ca:
        return grpc.insecure_channel(server)
    with open(ca, "rb") as file:
        return grpc.secure_channel(server, grpc.ssl_channel_credentials(file.read()))


def main():
    parser = argparse.ArgumentParser(description="Ask a nibble server one question.")
    parser.add_argument("question")
    parser.add_argument("--server", default="127.0.0.1:50051")
    parser.add_argument("--ca", help="PEM file of who signs the server's certificate")
    parser.add_argument("--stubs", default="stubs", help="folder of the generated Python stubs")
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    sys.path.insert(0, arguments.stubs)
    from nibble.inference.v1 import inference_pb2 as pb
    from nibble.inference.v1 import inference_pb2_grpc as rpc

    request = pb.ChatRequest(
        messages=[pb.ChatMessage(role="user", content=arguments.question)],
        stopping=pb.StoppingCriteria(max_tokens=arguments.max_tokens))
    key = os.environ.get("NIBBLE_API_KEY")
    metadata = [("authorization", f"Bearer {key}")] if key else []
    with connect(arguments.server, arguments.ca) as channel:
        stub = rpc.InferenceServiceStub(channel)
        try:
            # The deadline travels with the call; leaving the loop early would cancel it.
            for event in stub.ChatStream(pb.ChatStreamRequest(request=request), timeout=60,
                                         metadata=metadata):
                if event.HasField("delta"):
                    print(event.delta.text, end="", flush=True)
                if event.HasField("finished"):
                    usage = event.finished.usage
                    print(f"\n[{usage.prompt_tokens} + {usage.completion_tokens} tokens]",
                          file=sys.stderr)
        except grpc.RpcError as error:
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
