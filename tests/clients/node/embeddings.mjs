// Embeddings by OpenAI's client for Node and by Vercel's AI SDK.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createOpenAI } from "@ai-sdk/openai";
import { cosineSimilarity, embed, embedMany } from "ai";
import OpenAI from "openai";
import { base, model } from "./common.mjs";

const key = { baseURL: base, apiKey: "none" };
const client = new OpenAI({ ...key, maxRetries: 0 });
const texts = ["sunny, 21 degrees", "What is 7 + 5?"];

test("vectors as base64 are those as numbers", async () => {
  const { data, usage } = await client.embeddings.create({ model, input: texts });
  const plain = await client.embeddings.create({ model, input: texts, encoding_format: "float" });
  assert.equal(data.length, texts.length);
  assert.equal(usage.total_tokens, plain.usage.total_tokens);
  for (const [at, { embedding }] of data.entries()) {
    assert.ok(embedding.length > 1);
    const difference = embedding.map((value, place) => Math.abs(value - plain.data[at].embedding[place]));
    assert.ok(Math.max(...difference) < 1e-6);
  }
});

test("the AI SDK embeds one text and many", async () => {
  for (const provider of [createOpenAICompatible({ name: "fastserve", ...key }), createOpenAI(key)]) {
    const embedder = provider.textEmbeddingModel(model);
    const many = await embedMany({ model: embedder, values: texts, maxRetries: 0 });
    const one = await embed({ model: embedder, value: texts[0], maxRetries: 0 });
    assert.ok(cosineSimilarity(one.embedding, many.embeddings[0]) > 0.9999);
    assert.ok(cosineSimilarity(one.embedding, many.embeddings[1]) < 0.9999);
    assert.ok(many.usage.tokens > one.usage.tokens);
  }
});
