// Vercel's AI SDK, by each of its providers that speaks one of the served APIs.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool, ToolLoopAgent } from "ai";
import { z } from "zod";
import { base, City, CityName, model, REPORT, SUM, TOTAL, WEATHER } from "./common.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;
const key = { baseURL: base, apiKey: "none" };
const providers = {
  compatible: createOpenAICompatible({ name: "fastserve", ...key, includeUsage: true, supportsStructuredOutputs: true })(model),
  chat: createOpenAI(key).chat(model),
  responses: createOpenAI(key)(model),
  anthropic: createAnthropic(key)(model),
};
const description = "Get the weather in a city";
const declared = { get_weather: tool({ description, inputSchema: CityName }) };
const run = { get_weather: tool({ description, inputSchema: CityName, execute: async () => REPORT }) };

for (const [name, provider] of Object.entries(providers)) {
  const common = { model: provider, temperature: 0, maxRetries: 0, maxOutputTokens: 400 };

  test(`${name}: text is the same whole and streamed`, async () => {
    const whole = await generateText({ ...common, prompt: SUM });
    assert.deepEqual([whole.text, whole.finishReason], [TOTAL, "stop"]);
    const stream = streamText({ ...common, prompt: SUM });
    assert.deepEqual([await stream.text, await stream.finishReason], [TOTAL, "stop"]);
    assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
    assert.ok(whole.usage.outputTokens > 0);
  });

  test(`${name}: a tool runs and its result is used`, async () => {
    const asked = { ...common, prompt: WEATHER, tools: run, stopWhen: stepCountIs(3) };
    for (const answer of [await generateText(asked), streamText(asked)]) {
      const steps = await answer.steps;
      const [call] = steps[0].toolCalls;
      assert.deepEqual([call.toolName, call.input], ["get_weather", { city: "Paris" }]);
      assert.equal(steps[0].finishReason, "tool-calls");
      assert.equal(steps.length, 2);
      assert.match(await answer.text, /sunny/);
      const messages = [{ role: "user", content: WEATHER }, ...(await answer.response).messages];
      const next = await generateText({ ...common, messages: [...messages, { role: "user", content: SUM }] });
      assert.equal(next.text, TOTAL);
    }
  });

  test(`${name}: a call that must come comes`, async () => {
    for (const toolChoice of ["required", { type: "tool", toolName: "get_weather" }]) {
      const answer = await generateText({ ...common, prompt: SUM, tools: declared, toolChoice });
      assert.deepEqual(answer.toolCalls.map((call) => call.toolName), ["get_weather"]);
      CityName.parse(answer.toolCalls[0].input);
    }
  });

  test(`${name}: objects and choices obey their schema`, async () => {
    const object = Output.object({ schema: City });
    const whole = await generateText({ ...common, prompt: SUM, output: object });
    City.parse(whole.output);
    const stream = streamText({ ...common, prompt: SUM, output: object });
    assert.deepEqual(await stream.output, whole.output);
    const options = ["Oslo", "Rome"];
    const chosen = await generateText({ ...common, prompt: SUM, output: Output.choice({ options }) });
    assert.ok(options.includes(chosen.output));
  });

  test(`${name}: records and strings with formats of zod's own are followed`, async () => {
    const schema = z.object({
      id: z.nanoid(),
      tag: z.string().startsWith("ab").max(4),
      flags: z.record(z.enum(["a", "b"]), z.boolean()),
      marks: z.partialRecord(z.enum(["c"]), z.boolean()),
    });
    const asked = { ...common, prompt: SUM, maxOutputTokens: 1500 };
    schema.parse((await generateText({ ...asked, output: Output.object({ schema }) })).output);
    const tools = { note: tool({ description: "Take a note", inputSchema: schema }) };
    const answer = await generateText({ ...asked, tools, toolChoice: "required" });
    schema.parse(answer.toolCalls[0].input);
  });

  test(`${name}: images are refused`, async () => {
    const image = { type: "image", image: new Uint8Array([137, 80, 78, 71, 13, 10, 26, 10]) };
    const messages = [{ role: "user", content: [{ type: "text", text: SUM }, image] }];
    await assert.rejects(generateText({ ...common, messages }), { statusCode: 400, message: /image/ });
  });

  test(`${name}: a stream is left in the middle`, async () => {
    const leave = new AbortController();
    const asked = { ...common, prompt: "Tell me a story.", abortSignal: leave.signal, onError() {} };
    let last;
    for await (const part of streamText(asked).fullStream) {
      if (part.type === "text-delta") leave.abort();
      last = part.type;
    }
    assert.equal(last, "abort");
  });
}

test("an agent runs its tools", async () => {
  const agent = new ToolLoopAgent({ model: providers.compatible, temperature: 0, tools: run });
  assert.match((await agent.generate({ prompt: WEATHER })).text, /sunny/);
});

test("responses refer to earlier ones, stored or sent in full", async () => {
  const first = await generateText({ model: providers.responses, temperature: 0, prompt: SUM });
  const openai = { previousResponseId: first.providerMetadata.openai.responseId };
  const asked = { model: providers.responses, temperature: 0, prompt: "What is 6 + 5?" };
  const next = await generateText({ ...asked, providerOptions: { openai } });
  const alone = await generateText(asked);
  assert.equal(next.text, "11");
  assert.ok(next.usage.inputTokens > alone.usage.inputTokens);
});

test("anthropic: thinking, effort and cache marks are accepted", async () => {
  const cacheControl = { type: "ephemeral" };
  const anthropic = { thinking: { type: "enabled", budgetTokens: 50 }, effort: "low", cacheControl };
  const messages = [
    { role: "user", content: SUM, providerOptions: { anthropic: { cacheControl } } },
    { role: "assistant", content: TOTAL },
    { role: "user", content: "What is 6 + 5?" },
  ];
  const asked = { model: providers.anthropic, maxOutputTokens: 400, system: "Answer briefly.", messages };
  assert.ok((await generateText({ ...asked, providerOptions: { anthropic } })).text);
});
