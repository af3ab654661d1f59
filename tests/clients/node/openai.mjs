// OpenAI's client for Node: chats, its runner of tools, zod schemas, responses, conversations, files and batches.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI, { APIUserAbortError, BadRequestError, toFile } from "openai";
import { zodFunction, zodResponseFormat, zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { base, City, CityName, model, REPORT, SUM, TOTAL, WEATHER } from "./common.mjs";

const client = new OpenAI({ baseURL: base, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const messages = [{ role: "user", content: SUM }];
const tool = { name: "get_weather", description: "Get the weather in a city" };

async function collect(items) {
  const all = [];
  for await (const item of items) all.push(item);
  return all;
}

test("a chat is the same whole and streamed", async () => {
  const whole = await client.chat.completions.create({ model, messages, temperature: 0 });
  assert.equal(whole.choices[0].message.content, TOTAL);
  const stream = client.chat.completions.stream({
    model, messages, temperature: 0, stream_options: { include_usage: true },
  });
  const text = (await collect(stream)).map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  const final = await stream.finalChatCompletion();
  assert.equal(text, TOTAL);
  assert.equal(final.choices[0].message.content, TOTAL);
  assert.equal(final.usage.total_tokens, whole.usage.total_tokens);
});

test("choices and logprobs of a stream are put together", async () => {
  const stream = client.chat.completions.stream({ model, messages, n: 2, seed: 3, logprobs: true, top_logprobs: 2 });
  const { choices } = await stream.finalChatCompletion();
  assert.deepEqual(choices.map((choice) => choice.index), [0, 1]);
  for (const choice of choices) {
    assert.equal(choice.logprobs.content.map((token) => token.token).join(""), choice.message.content);
    assert.ok(choice.logprobs.content.every((token) => token.top_logprobs.length === 2));
  }
});

for (const stream of [false, true]) {
  test(`the runner of tools calls a function and answers (stream: ${stream})`, async () => {
    const calls = [];
    const run = async (given) => (calls.push(given), REPORT);
    const runner = client.chat.completions.runTools({
      model, stream, temperature: 0, messages: [{ role: "user", content: WEATHER }],
      tools: [zodFunction({ ...tool, parameters: CityName, function: run })],
    });
    assert.match(await runner.finalContent(), /sunny/);
    assert.deepEqual(calls, [{ city: "Paris" }]);
    assert.deepEqual(runner.messages.map((message) => message.role), ["user", "assistant", "tool", "assistant"]);
  });
}

test("a schema of zod is obeyed and parsed", async () => {
  const form = { response_format: zodResponseFormat(City, "city") };
  const whole = await client.chat.completions.parse({ model, messages, temperature: 0, ...form });
  City.parse(whole.choices[0].message.parsed);
  const stream = client.chat.completions.stream({ model, messages, temperature: 0, ...form });
  assert.deepEqual((await stream.finalChatCompletion()).choices[0].message.parsed, whole.choices[0].message.parsed);
});

test("responses are streamed and parsed", async () => {
  const stream = client.responses.stream({ model, input: SUM, temperature: 0 });
  const kinds = (await collect(stream)).map((event) => event.type);
  assert.equal(kinds[0], "response.created");
  assert.equal(kinds.at(-1), "response.completed");
  assert.equal((await stream.finalResponse()).output_text, TOTAL);
  const text = { format: zodTextFormat(City, "city") };
  City.parse((await client.responses.parse({ model, input: SUM, temperature: 0, text })).output_parsed);
  City.parse((await client.responses.stream({ model, input: SUM, temperature: 0, text }).finalResponse()).output_parsed);
});

test("a function of a response is answered by reference and in full", async () => {
  const tools = [zodResponsesFunction({ ...tool, parameters: CityName })];
  const first = await client.responses.parse({ model, input: WEATHER, tools, temperature: 0 });
  const call = first.output.find((item) => item.type === "function_call");
  assert.deepEqual(call.parsed_arguments, { city: "Paris" });
  const output = { type: "function_call_output", call_id: call.call_id, output: REPORT };
  const common = { model, tools, temperature: 0 };
  const next = await client.responses.create({ ...common, previous_response_id: first.id, input: [output] });
  const { output: sent } = await client.responses.create({ ...common, input: WEATHER, store: false });
  assert.equal(sent[0].type, "function_call");
  const input = [{ role: "user", content: WEATHER }, ...sent, { ...output, call_id: sent[0].call_id }];
  const full = await client.responses.create({ ...common, input, store: false });
  assert.match(next.output_text, /sunny/);
  assert.equal(full.output_text, next.output_text);
});

test("a background response is read again, and one is cancelled", async () => {
  const events = await collect(await client.responses.create({ model, input: SUM, background: true, stream: true }));
  const { id } = events[0].response;
  const again = await collect(await client.responses.retrieve(id, { stream: true, starting_after: 1 }));
  assert.deepEqual(again, events.slice(2));
  const long = { model, input: SUM, background: true, ignore_eos: true, max_output_tokens: 1500 };
  const running = await client.responses.create(long);
  assert.equal((await client.responses.cancel(running.id)).status, "cancelled");
});

test("a conversation keeps its items", async () => {
  const { id } = await client.conversations.create({ metadata: { a: "b" } });
  await client.responses.create({ model, conversation: id, input: SUM });
  const items = await collect(client.conversations.items.list(id, { order: "asc" }));
  assert.deepEqual(items.map((item) => item.role), ["user", "assistant"]);
});

test("a file is sent, and a batch of it is answered", async () => {
  const line = { custom_id: "a", method: "POST", url: "/v1/chat/completions", body: { model, messages, temperature: 0 } };
  const content = await toFile(Buffer.from(JSON.stringify(line) + "\n"), "in.jsonl");
  const file = await client.files.create({ file: content, purpose: "batch" });
  const form = { input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h" };
  let batch = await client.batches.create(form);
  for (let tries = 0; tries < 300 && !["completed", "failed"].includes(batch.status); tries++) {
    await new Promise((resolve) => setTimeout(resolve, 100));
    batch = await client.batches.retrieve(batch.id);
  }
  assert.equal(batch.status, "completed");
  const answer = JSON.parse(await (await client.files.content(batch.output_file_id)).text());
  assert.equal(answer.response.body.choices[0].message.content, TOTAL);
});

test("an error is the client's class for it and names the field", async () => {
  const wrong = client.chat.completions.create({ model, messages, temperature: 9 });
  await assert.rejects(wrong, (error) => error instanceof BadRequestError && error.param === "temperature");
  const image = [{ role: "user", content: [{ type: "input_image", image_url: "data:," }] }];
  await assert.rejects(client.responses.create({ model, input: image }), BadRequestError);
});

test("a stream is left in the middle, and the next request is answered", async () => {
  const long = { model, input: SUM, ignore_eos: true, max_output_tokens: 1500 };
  const stream = client.responses.stream(long);
  const read = async () => {
    for await (const event of stream) if (event.type === "response.output_text.delta") stream.abort();
  };
  await assert.rejects(read(), APIUserAbortError);
  const next = await client.chat.completions.create({ model, messages, temperature: 0 });
  assert.equal(next.choices[0].message.content, TOTAL);
});
