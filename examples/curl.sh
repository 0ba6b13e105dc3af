#!/usr/bin/env bash
# The HTTP API by curl, against a running server: examples/curl.sh [URL]
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
json='Content-Type: application/json'

curl -sf "$url/health/ready" >/dev/null
model=$(curl -sf "$url/v1/models" | sed 's/.*"id":"\([^"]*\)".*/\1/')

curl -sf "$url/v1/completions" -H "$json" \
  -d "{\"model\": \"$model\", \"prompt\": \"The capital of France is\", \"max_tokens\": 8, \"temperature\": 0}"
echo
curl -sfN "$url/v1/chat/completions" -H "$json" \
  -d "{\"model\": \"$model\", \"messages\": [{\"role\": \"user\", \"content\": \"Say hello.\"}], \"max_tokens\": 8, \"stream\": true}"
curl -sf "$url/metrics" | grep '^vllm:num_requests_running' || true  # the engine's metrics: vLLM's names, and pagegraph's own
