// Anthropic's client for Node: messages, streams, its runner of tools, zod schemas, counts, models and errors.
import assert from "node:assert/strict";
import { test } from "node:test";
import Anthropic, { APIUserAbortError, BadRequestError, NotFoundError } from "@anthropic-ai/sdk";
import { betaZodTool } from "@anthropic-ai/sdk/helpers/beta/zod";
import { zodOutputFormat } from "@anthropic-ai/sdk/helpers/zod";
import { z } from "zod";
import { base, CityName, model, REPORT, SUM, TOTAL, WEATHER } from "./common.mjs";

const client = new Anthropic({ baseURL: base.replace("/v1", ""), apiKey: "none", maxRetries: 0, timeout: 60_000 });
const ask = (content) => ({ model, max_tokens: 400, temperature: 0, messages: [{ role: "user", content }] });

test("a message is the same whole and streamed, and its tokens are counted", async () => {
  const whole = await client.messages.create({ ...ask(SUM), system: [{ type: "text", text: "Answer." }] });
  assert.deepEqual(whole.content, [{ type: "text", text: TOTAL }]);
  const stream = client.messages.stream({ ...ask(SUM), system: "Answer." });
  const texts = [];
  stream.on("text", (text) => texts.push(text));
  const final = await stream.finalMessage();
  assert.equal(texts.join(""), TOTAL);
  assert.deepEqual([final.stop_reason, final.usage.output_tokens], [whole.stop_reason, whole.usage.output_tokens]);
  const { messages } = ask(SUM);
  const { input_tokens } = await client.messages.countTokens({ model, messages, system: "Answer." });
  assert.equal(input_tokens, whole.usage.input_tokens + whole.usage.cache_read_input_tokens);
});

for (const stream of [false, true]) {
  test(`the runner of tools calls a function and answers (stream: ${stream})`, async () => {
    const calls = [];
    const run = async (given) => (calls.push(given), REPORT);
    const tool = { name: "get_weather", description: "Get the weather in a city", inputSchema: CityName, run };
    const runner = client.beta.messages.toolRunner({ ...ask(WEATHER), stream, tools: [betaZodTool(tool)] });
    const last = await runner.runUntilDone();
    assert.match(last.content[0].text, /sunny/);
    assert.deepEqual(calls, [{ city: "Paris" }]);
  });
}

test("a schema of zod is obeyed and parsed", async () => {
  // The helper moves bounds such as the length of a text to its description, so there are none here.
  const Weather = z.object({ sunny: z.boolean(), wind: z.enum(["none", "strong"]) });
  const form = { output_config: { format: zodOutputFormat(Weather) } };
  Weather.parse((await client.messages.parse({ ...ask(SUM), ...form })).parsed_output);
});

test("models are listed, and errors are the client's classes for them", async () => {
  const ids = [];
  for await (const card of client.models.list()) ids.push(card.id);
  assert.ok(ids.includes(model));
  assert.equal((await client.models.retrieve(model)).type, "model");
  await assert.rejects(client.messages.create({ ...ask(SUM), model: "none-such" }), NotFoundError);
  const image = { type: "image", source: { type: "base64", media_type: "image/png", data: "aGk=" } };
  await assert.rejects(
    client.messages.create(ask([image])),
    (error) => error instanceof BadRequestError && error.error.error.param === "messages.0.content.0",
  );
});

test("a stream is left in the middle, and the next request is answered", async () => {
  const stream = client.messages.stream(ask("Tell me a story."));
  stream.on("text", () => stream.abort());
  await assert.rejects(stream.finalMessage(), APIUserAbortError);
  assert.equal((await client.messages.create(ask(SUM))).content[0].text, TOTAL);
});
