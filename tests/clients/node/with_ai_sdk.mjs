// Vercel's AI SDK with @ai-sdk/openai-compatible (chat, completions) and @ai-sdk/openai (Responses API and chat).

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, embedMany, generateText, isStepCount, streamText, tool } from "ai";
import { z } from "zod";
import { ANSWER, API_URL, CITIES, KEY, MODEL, QUESTION, check, main, note, testCase } from "./cases.mjs";

const settings = { name: "served", baseURL: API_URL, apiKey: KEY, supportsStructuredOutputs: true, includeUsage: true };
const compatible = createOpenAICompatible(settings);
const openai = createOpenAI({ baseURL: API_URL, apiKey: KEY });
const models = {
  compatible: compatible.chatModel(MODEL),
  "openai chat": openai.chat(MODEL),
  "openai responses": openai(MODEL),
};
const one = { served: { parallel_tool_calls: false }, openai: { parallelToolCalls: false } };
const ask = { providerOptions: one, prompt: QUESTION, temperature: 0, maxOutputTokens: 100, maxRetries: 0 };
const person = z.object({ name: z.string().max(12), age: z.number().int().min(0).max(120) });

function tools(called) {
  return {
    weather: tool({
      description: "Tell the weather of a city.",
      inputSchema: z.object({ city: z.enum(CITIES), days: z.number().int().min(1).max(9) }),
      execute: async ({ city }) => {
        called.push(city);
        return `It rains in ${city}.`;
      },
    }),
  };
}

// The first step has to call, the second has to answer.
const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" });

for (const [name, model] of Object.entries(models)) {
  testCase("plain", name, async () => {
    const { text, usage, finishReason } = await generateText({ ...ask, model });
    check(text.includes(ANSWER) && usage.outputTokens > 0 && finishReason === "stop", text, usage, finishReason);
  });

  testCase("stream", name, async () => {
    const result = streamText({ ...ask, model, onError: ({ error }) => console.error(error) });
    const pieces = [];
    for await (const piece of result.textStream) pieces.push(piece);
    check(pieces.length > 3 && pieces.join("").includes(ANSWER), pieces);
    check((await result.usage).outputTokens > 0 && (await result.finishReason) === "stop");
  });

  testCase("tools", name, async () => {
    const called = [];
    const found = await generateText({ ...ask, model, tools: tools(called), prepareStep, stopWhen: isStepCount(2) });
    check(called.length > 0 && found.steps.length === 2 && found.text.length > 0, called, found.text);
  });

  testCase("tools", `${name} stream`, async () => {
    const called = [];
    const result = streamText({ ...ask, model, tools: tools(called), prepareStep, stopWhen: isStepCount(2) });
    for await (const part of result.fullStream) if (part.type === "error") throw part.error;
    check(called.length > 0 && (await result.steps).length === 2, called);
  });

  testCase("structured", name, async () => {
    const { output } = await generateText({ ...ask, model, output: Output.object({ schema: person }) });
    person.parse(output);
  });

  testCase("structured", `${name} stream`, async () => {
    const result = streamText({ ...ask, model, output: Output.object({ schema: person }) });
    for await (const part of result.fullStream) if (part.type === "error") throw part.error;
    person.parse(await result.output);
  });
}

testCase("plain", "completion model", async () => {
  const model = compatible.completionModel(MODEL);
  const { text } = await generateText({ ...ask, prompt: "The capital of France is", maxOutputTokens: 8, model });
  check(text.length > 0, text);
});

for (const [name, provider] of Object.entries({ compatible, openai })) {
  testCase("embeddings", name, async () => {
    const values = ["a cat", "a dog"];
    const { embeddings } = await embedMany({ model: provider.embeddingModel(MODEL), values, maxRetries: 0 });
    check(embeddings.length === 2 && embeddings[0].length > 0 && embeddings[0][0] !== embeddings[1][0]);
  });
}

note("generateText and streamText over each provider: chat, openai chat, openai Responses API");
await main("ai", "@ai-sdk/openai-compatible", "@ai-sdk/openai");
