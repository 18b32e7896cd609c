// Vercel's AI SDK, on which chat front ends in JavaScript are built, against `zebroid serve` with the embedded teacher.
//
//   cd FOLDER && npm install ai@6 @ai-sdk/openai-compatible@2 @ai-sdk/openai@3 zod@4     (tests/clients/install.sh does, in target/clients)
//   OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=.. node /path/to/tests/clients/ai_sdk.mjs
import assert from 'node:assert/strict'
import { createRequire } from 'node:module'

// Packages lie where this is started, not where it stands.
const require = createRequire(`${process.cwd()}/`)
const { APICallError, Output, generateText, stepCountIs, streamText, tool } = require('ai')
const { createOpenAICompatible } = require('@ai-sdk/openai-compatible')
const { createOpenAI } = require('@ai-sdk/openai')
const { z } = require('zod')

const place = { name: 'zebroid', baseURL: process.env.OPENAI_BASE_URL, apiKey: process.env.OPENAI_API_KEY }
const zebroid = createOpenAICompatible({ ...place, includeUsage: true, supportsStructuredOutputs: true })
const model = zebroid('teacher')
const ask = { model, system: 'One day', prompt: 'Tom had a red', temperature: 0, maxOutputTokens: 12, maxRetries: 0 }

const whole = await generateText(ask)
assert.equal(whole.finishReason, 'length')
assert.equal(whole.usage.outputTokens, 12)
assert.equal(whole.usage.totalTokens, whole.usage.inputTokens + 12)

// By way of chat completions, and of responses.
for (const way of [model, createOpenAI(place).responses('teacher')]) {
  const streamed = streamText({ ...ask, model: way })
  let text = ''
  for await (const piece of streamed.textStream) text += piece
  assert.equal(text, whole.text)
  assert.equal(await streamed.finishReason, 'length')
  assert.equal((await streamed.usage).outputTokens, 12)
}

// A conversation goes on as the front end kept it.
const messages = [{ role: 'user', content: 'Tom had a red' }, { role: 'assistant', content: whole.text }, { role: 'user', content: [{ type: 'text', text: 'Mia' }] }]
const next = await generateText({ model, messages, temperature: 0, maxOutputTokens: 40, stopSequences: ['a', 'e', 'i', 'o', 'u'], maxRetries: 0 })
assert.equal(next.finishReason, 'stop')
assert.match(next.text, /^[^aeiou]*$/)

const completed = await generateText({ ...ask, system: undefined, model: zebroid.completionModel('teacher') })
assert.equal(completed.usage.outputTokens, 12)

const Toy = z.object({ name: z.enum(['ball', 'kite']), big: z.boolean() })
const output = Output.object({ schema: Toy })
const form = { ...ask, maxOutputTokens: 200, output }
const toy = (await generateText(form)).output
assert.ok(Toy.parse(toy))
const growing = streamText(form)
let last
for await (const part of growing.partialOutputStream) last = part
assert.deepEqual(last, toy)

// A tool is called, carried out here, and what came of it is read.
const look = tool({ description: 'Looks at a place.', inputSchema: z.object({ place: z.enum(['park', 'lake']) }), execute: ({ place }) => `a ${place}` })
const steps = { ...ask, maxOutputTokens: 100, tools: { look }, toolChoice: { type: 'tool', toolName: 'look' }, stopWhen: stepCountIs(2) }
for (const { toolResults } of [(await generateText(steps)).steps[1], (await streamText(steps).steps)[1]]) {
  assert.equal(toolResults.length, 1)
  assert.equal(toolResults[0].output, `a ${toolResults[0].input.place}`)
}

await assert.rejects(generateText({ ...ask, model: zebroid('absent') }), error => APICallError.isInstance(error) && error.statusCode === 404 && /absent/.test(error.message))
const stranger = createOpenAICompatible({ ...place, apiKey: 'wrong' })
await assert.rejects(generateText({ ...ask, model: stranger('teacher') }), error => error.statusCode === 401)

// Who stops an answer is not told more of it, and its place is free.
const controller = new AbortController()
const left = streamText({ ...ask, maxOutputTokens: 240, abortSignal: controller.signal, onAbort() {} })
for await (const _ of left.textStream) controller.abort()
async function status() {
  const answer = await fetch(new URL('/api/models', place.baseURL), { headers: { authorization: `Bearer ${place.apiKey}` } })
  return (await answer.json()).models.teacher
}
for (let turn = 0; (await status()).running > 0; turn++) {
  assert.ok(turn < 500, 'an answer that was left goes on')
  await new Promise(done => setTimeout(done, 10))
}
