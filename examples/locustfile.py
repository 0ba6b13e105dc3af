"""Streamed chats under locust (`pip install locust`), against any server of the OpenAI protocol.

runtime serve configs/smollm2-cpu.yaml
locust -f examples/locustfile.py --headless --users 4 --run-time 60s --host http://127.0.0.1:8000

Beside each POST, whose time is that of the whole answer, locust's tables get two rows: TTFT, from the request to the
first event with text, and ITL, the gap between two such events. Locust stores whole milliseconds and rounds above 100.
"""

import json
import time

from locust import HttpUser, events, task

PROMPTS = (
    "Say in one sentence what the sea is.",
    "Count from one to thirty in words.",
    "Write a short story about a cat who learns to read.",
)


@events.init_command_line_parser.add_listener
def add_arguments(parser):
    parser.add_argument("--chat-model", default="", help="Name in requests; the first of /v1/models if not given")
    parser.add_argument("--max-tokens", type=int, default=64, help="Tokens of an answer at most")


class Chatter(HttpUser):
    """A user who asks, reads the answer to its end, and asks again."""

    def on_start(self):
        self.options = self.environment.parsed_options
        self.model = self.options.chat_model or self.client.get("/v1/models").json()["data"][0]["id"]
        self.asked = 0

    @task
    def chat(self):
        self.asked += 1
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": PROMPTS[self.asked % len(PROMPTS)]}],
            "max_tokens": self.options.max_tokens,
            "stream": True,
        }
        begin = time.perf_counter()
        with self.client.post("/v1/chat/completions", json=body, stream=True, catch_response=True) as answer:
            if not answer.ok:
                answer.failure(f"status {answer.status_code}: {answer.text[:200]}")
                return
            last, ended = begin, False
            for line in answer.iter_lines():
                now = time.perf_counter()
                field, _, data = line.partition(b":")
                if data.strip() == b"[DONE]":
                    ended = True
                elif field == b"data":  # other lines are empty, or comments that keep the connection open
                    event = json.loads(data)
                    if "error" in event:
                        answer.failure(str(event["error"])[:200])
                        return
                    if any(choice["delta"].get("content") for choice in event["choices"]):
                        self.record("TTFT" if last == begin else "ITL", now - last)
                        last = now
            answer.request_meta["response_time"] = 1e3 * (last - begin)
            if ended and last > begin:
                answer.success()
            else:
                answer.failure("the stream ended early" if not ended else "no text in the answer")

    def record(self, kind, seconds):
        """A row of locust's tables of its own."""
        self.environment.events.request.fire(
            request_type=kind, name="chat", response_time=1e3 * seconds, response_length=0, exception=None, context={}
        )
