// The ordinary phoenix client against a FleetLM gateway. Run by ../test_phoenix_js.py, which answers what is asked of it
// over stdout ("ASK drop", "ASK append <n>", "ASK drain") with a line on stdin. Exit status 0: everything held.
//
// Must not be done here: anything that the phoenix client does not do by itself; that is what is tested.

import assert from "node:assert/strict"
import readline from "node:readline"
import { Socket } from "phoenix"
import WebSocket from "ws"

const [url, session] = process.argv.slice(2)
const topic = `session:${session}`
const DEADLINE_MS = 15_000

const answers = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]()
async function ask(what) {
  console.log(`ASK ${what}`)
  const { value } = await answers.next()
  return value
}

function within(promise, what) {
  let timer
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no ${what} within ${DEADLINE_MS} ms`)), DEADLINE_MS)
  })
  return Promise.race([promise, late]).finally(() => clearTimeout(timer))
}

/** The answer to a push or join, as [status, response]. */
function answer(push, what) {
  return within(
    new Promise((resolve) => {
      for (const status of ["ok", "error", "timeout"]) push.receive(status, (response) => resolve([status, response]))
    }),
    `answer to ${what}`,
  )
}

/** What a channel was pushed, waited for in order. */
class Inbox {
  constructor(channel) {
    this.seqs = []
    this.events = []
    this.waiting = []
    channel.on("messages", ({ messages }) => {
      for (const message of messages) this.seqs.push(message.seq)
      this.add("messages", messages)
    })
    for (const event of ["caught_up", "gap", "read", "draining"]) channel.on(event, (payload) => this.add(event, payload))
  }

  add(event, payload) {
    this.events.push([event, payload])
    for (const wake of this.waiting.splice(0)) wake()
  }

  async until(holds, what) {
    while (!holds(this)) await within(new Promise((resolve) => this.waiting.push(resolve)), what)
  }

  count(event) {
    return this.events.filter(([name]) => name === event).length
  }
}

function connect(params, options = {}) {
  const socket = new Socket(url, {
    params,
    transport: WebSocket,
    heartbeatIntervalMs: 200,
    reconnectAfterMs: () => 50,
    rejoinAfterMs: () => 50,
    ...options,
  })
  socket.connect()
  return socket
}

const upTo = (from, to) => Array.from({ length: to - from + 1 }, (_, at) => from + at)

const socket = connect({ participant_id: "zoë/1", participant_kind: "agent" })
const beats = []
socket.onMessage((message) => {
  if (message.topic === "phoenix" && message.event === "phx_reply") beats.push(message.payload.status)
})

const steps = {
  async "join an empty session with a cursor"() {
    const channel = socket.channel(topic, { cursor: 0 })
    const inbox = new Inbox(channel)
    const [status, response] = await answer(channel.join(), "join")
    assert.equal(status, "ok")
    assert.deepEqual(Object.keys(response), ["session_id", "epoch", "last_seq", "earliest_seq"])
    assert.equal(response.session_id, session)
    await inbox.until((found) => found.count("caught_up") === 1, "caught_up")

    const [appended, ack] = await answer(channel.push("append", { content: { text: "hé\u0000 😀" } }), "append")
    assert.equal(appended, "ok")
    assert.deepEqual(Object.keys(ack), ["seq", "id", "inserted_at", "deduped"])
    await inbox.until((found) => found.seqs.length === 1, "own message")
    const message = inbox.events.at(-1)[1][0]
    assert.deepEqual(message.content, { text: "hé\u0000 😀" })
    assert.deepEqual([message.seq, message.sender_id, message.sender_kind], [1, "zoë/1", "agent"])

    const [, batch] = await answer(channel.push("append", { messages: [{ content: 2 }, { content: 3 }] }), "batch")
    assert.deepEqual(batch.messages.map((one) => one.seq), [2, 3])

    const [wrong, error] = await answer(channel.push("append", { contents: 1 }), "refused append")
    assert.deepEqual([wrong, error.code, error.field], ["error", "INVALID", "contents"])
    const [unknown, reason] = await answer(channel.push("nonsense", {}), "unknown event")
    assert.deepEqual([unknown, reason.reason], ["error", "unknown_event"])

    const [, page] = await answer(channel.push("replay", { after: 1, limit: 1 }), "replay")
    assert.deepEqual([page.messages.map((one) => one.seq), page.has_more], [[2], true])
    const [, read] = await answer(channel.push("mark_read", { seq: 2 }), "mark_read")
    assert.deepEqual(read, { last_read_seq: 2 })
    await inbox.until((found) => found.count("read") === 1, "read")

    let closed = 0
    channel.onClose(() => (closed += 1))
    assert.equal((await answer(channel.leave(), "leave"))[0], "ok")
    assert.equal(closed, 1)
  },

  async "many pushes without waiting are answered each, in order"() {
    const channel = socket.channel(topic, {})
    channel.join()
    const pushes = upTo(1, 50).map((n) => answer(channel.push("append", { content: n }), `append ${n}`))
    const seqs = (await Promise.all(pushes)).map(([status, ack]) => (assert.equal(status, "ok"), ack.seq))
    assert.deepEqual(seqs, upTo(4, 53))
    await answer(channel.leave(), "leave")
  },

  async "rejoin after leave replays from the cursor"() {
    const channel = socket.channel(topic, { cursor: 50 })
    const inbox = new Inbox(channel)
    assert.equal((await answer(channel.join(), "join"))[0], "ok")
    await inbox.until((found) => found.count("caught_up") === 1, "caught_up")
    assert.deepEqual(inbox.seqs, upTo(51, 53))
    await answer(channel.leave(), "leave")
  },

  async "a second join of the topic closes the first channel"() {
    const first = socket.channel(topic, {})
    assert.equal((await answer(first.join(), "join"))[0], "ok")
    const closed = new Promise((resolve) => first.onClose(resolve))
    // Not by a second Channel object: phoenix.js would leave the first by itself before.
    socket.push({ topic, event: "phx_join", payload: {}, ref: "dup", join_ref: "dup" })
    await within(closed, "phx_close of the first")
    socket.push({ topic, event: "phx_leave", payload: {}, ref: "dup2", join_ref: "dup" })
  },

  async "two Channel objects of one topic: the later one works"() {
    const [first, second] = [socket.channel(topic, {}), socket.channel(topic, {})]
    await answer(first.join(), "first join")
    const inbox = new Inbox(second)
    assert.equal((await answer(second.join(), "second join"))[0], "ok")
    await answer(second.push("append", { content: "two" }), "append")
    await inbox.until((found) => found.seqs.length === 1, "message")
    await answer(second.leave(), "leave")
  },

  async "refused joins are errors of the join"() {
    for (const [name, params, code, reason] of [
      [topic, { cursor: 10_000 }, "INVALID", "cursor_ahead"],
      [topic, { curser: 1 }, "INVALID", "unknown_field"],
      ["inbox:somebody", {}, "FORBIDDEN", "forbidden"],
      ["room:lobby", {}, "INVALID", "unmatched topic"],
      [`session:${"x".repeat(129)}`, {}, "INVALID", "invalid"],
    ]) {
      const channel = socket.channel(name, params)
      const [status, response] = await answer(channel.join(), name)
      assert.deepEqual([status, response.code, response.reason], ["error", code, reason])
      channel.leave()
    }
  },

  async "any id of 128 bytes works"() {
    for (const name of [`${session}/%20?x=1#:é`, "日".repeat(42), "y".repeat(128)]) {
      const channel = socket.channel(`session:${name}`, { cursor: 0 })
      assert.equal((await answer(channel.join(), name))[1].session_id, name)
      assert.equal((await answer(channel.push("append", { content: 1 }), "append"))[0], "ok")
      await answer(channel.leave(), "leave")
    }
  },

  async "heartbeats are answered"() {
    const before = beats.length
    const deadline = Date.now() + DEADLINE_MS
    while (beats.length < before + 2 && Date.now() < deadline) await new Promise((resolve) => setTimeout(resolve, 50))
    assert.deepEqual([...new Set(beats)], ["ok"])
    assert.ok(beats.length >= before + 2)
  },

  async "a dropped socket comes back with its cursor and misses nothing"() {
    let cursor = 54
    const channel = socket.channel(topic, () => ({ cursor }))
    const inbox = new Inbox(channel)
    channel.on("messages", ({ messages }) => (cursor = messages.at(-1).seq))
    await answer(channel.join(), "join")
    await inbox.until((found) => found.count("caught_up") === 1, "caught_up")
    for (let round = 1; round <= 3; round += 1) {
      await ask("drop")
      await ask("append 5")
      await inbox.until((found) => found.seqs.length === 5 * round, "messages after the drop")
      await inbox.until((found) => found.count("caught_up") === 1 + round, "caught_up after the drop")
    }
    assert.deepEqual(inbox.seqs, upTo(55, 69))
    await answer(channel.leave(), "leave")
  },

  async "a binary push closes the socket and says so"() {
    const other = connect({ participant_id: "b" }, { reconnectAfterMs: () => 3_600_000 })
    const channel = other.channel(topic, {})
    await answer(channel.join(), "join")
    const closed = new Promise((resolve) => other.onClose(resolve))
    channel.push("append", new Uint8Array([1, 2, 3]).buffer)
    assert.equal((await within(closed, "close")).code, 4502)
    other.disconnect()
  },

  async "draining is told, then the socket is closed to reconnect"() {
    const channel = socket.channel(topic, {})
    const inbox = new Inbox(channel)
    await answer(channel.join(), "join")
    const closed = new Promise((resolve) => socket.onClose(resolve))
    await ask("drain")
    await inbox.until((found) => found.count("draining") === 1, "draining")
    assert.ok(inbox.events.find(([name]) => name === "draining")[1].retry_after_ms > 0)
    assert.equal((await within(closed, "close")).code, 4000)
    socket.disconnect()
  },
}

for (const [name, step] of Object.entries(steps)) {
  try {
    await step()
  } catch (error) {
    console.log(`FAILED ${name}: ${error.stack}`)
    process.exit(1)
  }
  console.log(`HELD ${name}`)
}
process.exit(0)
