"""LlamaIndex's OpenAILike and OpenAILikeEmbedding, and its FunctionAgent."""

from typing import Any, Literal

from cases import API_URL, KEY, MODEL, TIMEOUT, case, main, note
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from shapes import ANSWER, CITIES, QUESTION, Person

OPTIONS: dict[str, Any] = dict(
    model=MODEL, api_base=API_URL, api_key=KEY, temperature=0, max_tokens=100, timeout=TIMEOUT, max_retries=0,
    context_window=8192,
)  # fmt: skip
chat = OpenAILike(**OPTIONS, is_chat_model=True, is_function_calling_model=True)
plain = OpenAILike(**{**OPTIONS, "max_tokens": 8})
ASK = [ChatMessage(role="user", content=QUESTION)]
called: list[str] = []


def weather(city: Literal["Paris", "Rome", "Oslo"]) -> str:
    """Tell the weather of a city."""
    called.append(city)
    return f"It rains in {city}."


TOOL = FunctionTool.from_defaults(weather)


@case("plain", "chat")
def check_chat() -> None:
    assert ANSWER in (chat.chat(ASK).message.content or "")


@case("plain")
def complete() -> None:
    assert ANSWER in plain.complete("The capital of France is").text and ANSWER in chat.complete(QUESTION).text


@case("plain")
async def chat_async() -> None:
    assert ANSWER in ((await chat.achat(ASK)).message.content or "")


@case("stream")
def chat_stream() -> None:
    pieces = [piece.delta or "" for piece in chat.stream_chat(ASK)]
    assert len(pieces) > 3 and "".join(pieces) == chat.chat(ASK).message.content


@case("stream")
def complete_stream() -> None:
    assert ANSWER in "".join(piece.delta or "" for piece in plain.stream_complete("The capital of France is"))


@case("stream")
async def chat_stream_async() -> None:
    assert ANSWER in "".join([piece.delta or "" async for piece in await chat.astream_chat(ASK)])


@case("tools")
def tool_required() -> None:
    answer = chat.chat_with_tools([TOOL], user_msg=QUESTION, tool_required=True)
    calls = chat.get_tool_calls_from_response(answer)
    assert calls and all(call.tool_kwargs["city"] in CITIES for call in calls)


@case("tools")
def tool_stream() -> None:
    *_, last = chat.stream_chat_with_tools([TOOL], user_msg=QUESTION, tool_required=True)
    (call,) = chat.get_tool_calls_from_response(last)
    assert call.tool_kwargs["city"] in CITIES


@case("tools")
def predict_and_call() -> None:
    called.clear()
    found = chat.predict_and_call([TOOL], user_msg=QUESTION, tool_required=True)
    assert called and found.response == f"It rains in {called[0]}."


@case("tools")
async def agent() -> None:
    called.clear()
    asked = FunctionAgent(tools=[TOOL], llm=chat, initial_tool_choice="weather", streaming=True)
    found = await asked.run(user_msg="What is the weather in Oslo?", max_iterations=4)
    assert called and found.response.content is not None


@case("structured")
def as_structured_llm() -> None:
    assert isinstance(chat.as_structured_llm(Person).chat(ASK).raw, Person)


@case("structured")
def native_structured_outputs() -> None:
    held = OpenAILike(**OPTIONS, is_chat_model=True, should_use_structured_outputs=True)
    assert isinstance(held.as_structured_llm(Person).chat(ASK).raw, Person)


@case("embeddings")
def embeddings() -> None:
    found = OpenAILikeEmbedding(model_name=MODEL, api_base=API_URL, api_key=KEY, embed_batch_size=4)
    one, two = found.get_text_embedding_batch(["a cat", "a dog"])
    assert one != two and len(one) == len(found.get_query_embedding("a cat"))


if __name__ == "__main__":
    note("OpenAILike, OpenAILikeEmbedding, FunctionAgent")
    main("llama-index-llms-openai-like")
