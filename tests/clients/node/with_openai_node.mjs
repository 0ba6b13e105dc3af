// openai for Node: chat, completions, responses, embeddings, models, and the helpers that run tools and parse types.

import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { ANSWER, API_URL, CITIES, KEY, MODEL, QUESTION, check, main, note, testCase } from "./cases.mjs";

const client = new OpenAI({ baseURL: API_URL, apiKey: KEY, maxRetries: 0, timeout: 120_000 });
const messages = [{ role: "user", content: QUESTION }];
const chat = { model: MODEL, messages, temperature: 0, max_completion_tokens: 100 };
const respond = { model: MODEL, input: QUESTION, temperature: 0, max_output_tokens: 100 };
const Weather = z.object({ city: z.enum(CITIES), days: z.number().int().min(1).max(9) });
const Person = z.object({ name: z.string().max(12), age: z.number().int().min(0).max(120) });
const tool = zodFunction({ name: "weather", description: "Tell the weather of a city.", parameters: Weather });
const one = { parallel_tool_calls: false };
const named = { type: "function", function: { name: "weather" } };

testCase("plain", "models", async () => {
  const list = await client.models.list();
  check(list.data[0].id === MODEL && (await client.models.retrieve(MODEL)).id === MODEL, list.data);
});

testCase("plain", "chat", async () => {
  const answer = await client.chat.completions.create(chat);
  check(answer.choices[0].message.content.includes(ANSWER) && answer.usage.total_tokens > 0, answer);
});

testCase("plain", "chat logprobs", async () => {
  const answer = await client.chat.completions.create({ ...chat, logprobs: true, top_logprobs: 2 });
  check(answer.choices[0].logprobs.content.every((token) => token.top_logprobs.length === 2), answer);
});

testCase("plain", "completions", async () => {
  const prompt = "The capital of France is";
  const answer = await client.completions.create({ model: MODEL, prompt, max_tokens: 8, temperature: 0 });
  check(answer.choices[0].text.includes(ANSWER), answer);
});

testCase("plain", "refusals", async () => {
  const error = await client.chat.completions.create({ ...chat, temperature: 3 }).catch((thrown) => thrown);
  check(error instanceof OpenAI.BadRequestError && error.param === "temperature", String(error));
});

testCase("plain", "responses", async () => {
  const answer = await client.responses.create(respond);
  check(answer.output_text.includes(ANSWER) && answer.status === "completed", answer);
});

testCase("stream", "chat stream", async () => {
  const pieces = [];
  for await (const chunk of await client.chat.completions.create({ ...chat, stream: true })) {
    pieces.push(chunk.choices[0]?.delta.content ?? "");
  }
  const whole = await client.chat.completions.create(chat);
  check(pieces.length > 3 && pieces.join("") === whole.choices[0].message.content, pieces);
});

testCase("stream", "chat stream helper", async () => {
  const options = { include_usage: true };
  const final = await client.chat.completions.stream({ ...chat, stream_options: options }).finalChatCompletion();
  check(final.choices[0].message.content.includes(ANSWER) && final.usage.completion_tokens > 0, final);
});

testCase("stream", "completions stream", async () => {
  const ask = { model: MODEL, prompt: "The capital of France is", max_tokens: 8, temperature: 0, stream: true };
  let text = "";
  for await (const chunk of await client.completions.create(ask)) text += chunk.choices[0]?.text ?? "";
  check(text.includes(ANSWER), text);
});

testCase("stream", "responses stream", async () => {
  const final = await client.responses.stream(respond).finalResponse();
  check(final.output_text.includes(ANSWER), final);
});

testCase("tools", "chat tool required and its answer used", async () => {
  const first = await client.chat.completions.parse({ ...chat, tools: [tool], tool_choice: "required", ...one });
  const { message, finish_reason } = first.choices[0];
  check(finish_reason === "tool_calls" && message.tool_calls.length > 0, first);
  for (const call of message.tool_calls) Weather.parse(call.function.parsed_arguments);
  const results = message.tool_calls.map(({ id }) => ({ role: "tool", tool_call_id: id, content: "It rains." }));
  const ask = { ...chat, messages: [...messages, message, ...results], tools: [tool], tool_choice: "none" };
  const second = await client.chat.completions.create(ask);
  check(second.choices[0].message.content.length > 0, second);
});

testCase("tools", "chat tool stream", async () => {
  const stream = client.chat.completions.stream({ ...chat, tools: [tool], tool_choice: named });
  const final = await stream.finalChatCompletion();
  Weather.parse(final.choices[0].message.tool_calls[0].function.parsed_arguments);
});

testCase("tools", "runTools", async () => {
  let called = 0;
  const run = ({ city }) => `It rains in ${city}, ${++called}.`;
  const runnable = {
    type: "function",
    function: { name: "weather", parse: JSON.parse, function: run, ...pick(tool.function) },
  };
  const runner = client.chat.completions.runTools(
    { ...chat, tools: [runnable], tool_choice: named },
    { maxChatCompletions: 2 },
  );
  await runner.done();
  check(called > 0, runner.messages);
});

function pick({ description, parameters }) {
  return { description, parameters };
}

testCase("tools", "responses tool stream", async () => {
  const tools = [zodResponsesFunction({ name: "weather", parameters: Weather })];
  const stream = client.responses.stream({ ...respond, tools, tool_choice: "required", ...one });
  const calls = (await stream.finalResponse()).output.filter((item) => item.type === "function_call");
  check(calls.length > 0, calls);
  for (const call of calls) Weather.parse(call.parsed_arguments);
});

testCase("structured", "chat parse", async () => {
  const form = zodResponseFormat(Person, "person");
  const answer = await client.chat.completions.parse({ ...chat, response_format: form });
  Person.parse(answer.choices[0].message.parsed);
});

testCase("structured", "chat stream", async () => {
  const form = zodResponseFormat(Person, "person");
  const final = await client.chat.completions.stream({ ...chat, response_format: form }).finalChatCompletion();
  Person.parse(final.choices[0].message.parsed);
});

testCase("structured", "responses parse", async () => {
  const text = { format: zodTextFormat(Person, "person") };
  Person.parse((await client.responses.parse({ ...respond, text })).output_parsed);
});

testCase("embeddings", "embeddings", async () => {
  const input = ["a cat", "a dog"];
  const asBase64 = await client.embeddings.create({ model: MODEL, input });
  const asFloats = await client.embeddings.create({ model: MODEL, input, encoding_format: "float" });
  const [one, same] = [asBase64.data[0].embedding, asFloats.data[0].embedding];
  check(one.length === same.length && one.every((value, at) => Math.abs(value - same[at]) < 1e-3), one.slice(0, 4));
});

note("chat, completions, Responses API, embeddings, models; runTools");
await main("openai");
