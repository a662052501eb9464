// Asks the server that the page came from, and counts what an answer is made of. Knows the protocol; knows no page.

const SERVER = new URL("..", import.meta.url); // the application may live below a path

// What the server refused, or why it could not be asked, in words for the reader.
export class Refusal extends Error {
  constructor(message, status = 0) {
    super(message.replace(/^[a-z]+(?= )/, (word) => word[0].toUpperCase() + word.slice(1))); // but for names of fields
    this.status = status;
  }
}

export async function ask(path, key, init = {}) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(new URL(path, SERVER), { ...init, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached. Is it running?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const said = body?.error?.message ?? `The server answered ${response.status} ${response.statusText}`;
  const wait = response.headers.get("Retry-After");
  throw new Refusal(wait ? `${said} (in about ${wait} s)` : said, response.status);
}

// Yields the chunks of one streamed answer. Ends in a Refusal when the stream fails or breaks off.
export async function* chunks(request, key, signal) {
  const response = await ask("v1/chat/completions", key, { method: "POST", body: JSON.stringify(request), signal });
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(chunk.error.message);
    yield chunk;
  }
  throw new Refusal("The answer broke off: the connection ended before it did.");
}

// The data of each server-sent event, as it arrives.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (let read = await reader.read(); !read.done; read = await reader.read()) {
      const parts = (buffer + read.value).split("\n\n");
      buffer = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The answer broke off: the connection was lost.");
  }
}

// What is counted while an answer arrives. Its first token comes from reading the prompt, each further step from a tree.
export class Count {
  began = performance.now();
  first = 0;
  last = 0;
  tokens = 0;
  steps = 0; // verify steps
  histogram = []; // [n − 1]: verify steps that gave n tokens

  // Text came; `total` is how many tokens there are by now, where the server says so. Returns how many came with it.
  text(total) {
    this.last = performance.now();
    const gained = total === undefined ? 0 : total - this.tokens;
    this.tokens += gained;
    if (!this.first) this.first = this.last;
    else if (gained) {
      this.steps += 1;
      this.histogram[gained - 1] = (this.histogram[gained - 1] ?? 0) + 1;
    }
    return gained;
  }

  // The server's own account is the truth: a step may end inside a character and show no text.
  settle(usage, speculation) {
    this.tokens = usage?.completion_tokens ?? this.tokens;
    this.steps = speculation?.num_spec_steps ?? this.steps;
    this.histogram = speculation?.acceptance_histogram ?? this.histogram;
  }

  get perStep() {
    return this.steps ? (this.tokens - 1) / this.steps : NaN;
  }

  // While decoding: from the first token to the last.
  get perSecond() {
    return this.tokens > 1 && this.last > this.first ? (this.tokens - 1) / ((this.last - this.first) / 1000) : NaN;
  }

  get firstAfter() {
    return (this.first - this.began) / 1000;
  }
}
