// The connection: one websocket to /v1/realtime, opened anew when it breaks.

const FIRST_WAIT = 0.5; // s before the first new attempt; each further one waits twice as long
const LONGEST_WAIT = 15;
const STABLE_SECONDS = 5; // a connection that lasted so long was a good one: the waits start small again
const OPENING_SECONDS = 15;
const MAX_BACKLOG = 512 * 1024; // bytes that wait in the browser; microphone sound beyond it is late anyway

/** An address on this server. Relative, so that the page works behind a proxy's path too. */
export const address = (path) => new URL(path, document.baseURI);

/** Headers of a request, with the API key where there is one. */
export const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

/** What the server says is wrong, of a refused request. */
export async function problemOf(response) {
  try {
    const { error, detail } = await response.json();
    return String(error?.message ?? detail ?? response.status);
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

export class Realtime extends EventTarget {
  /**
   * States: `connecting`, `online`, `waiting` (for the next attempt), `locked` (the key is missing or wrong) and
   * `ended` (by the server, on purpose). `state` events hold {state, problem, reason}, `models` events the models,
   * and `event` events what the server sent.
   */
  constructor() {
    super();
    this.key = "";
    this.model = "";
    this.state = "connecting";
    this.attempts = 0;
    this.opened = NaN;
    this.socket = null;
    this.generation = 0; // of the connection: whatever belongs to an older one is ignored
    window.addEventListener("online", () => this.state === "waiting" && this.connect());
    window.addEventListener("offline", () => this.state === "online" && this.lost(this.generation, "offline"));
  }

  change(state, more = {}) {
    this.state = state;
    this.dispatchEvent(new CustomEvent("state", { detail: { state, ...more } }));
  }

  /** Opens a connection, in place of the one there may be; its conversation starts empty. */
  async connect() {
    const generation = this.drop();
    this.change("connecting");
    let response;
    try {
      // A browser does not tell why a websocket was refused; a request does.
      response = await fetch(address("v1/models"), { headers: headers(this.key), cache: "no-store" });
    } catch {
      return this.retry(generation, navigator.onLine ? "unreachable" : "offline");
    }
    if (generation !== this.generation) return;
    if (response.status === 401 || response.status === 403) {
      return this.change("locked", { problem: this.key ? "wrongKey" : "missingKey" });
    }
    if (response.status === 503 || response.status === 429) {
      return this.retry(generation, "busy", Number(response.headers.get("Retry-After")) || 0);
    }
    if (!response.ok) return this.retry(generation, "unreachable");
    const models = (await response.json()).data.map(({ id }) => id);
    if (generation !== this.generation) return;
    if (!models.includes(this.model)) this.model = models[0];
    this.dispatchEvent(new CustomEvent("models", { detail: models }));
    this.openSocket(generation);
  }

  openSocket(generation) {
    const url = address("v1/realtime");
    url.protocol = url.protocol.replace("http", "ws");
    url.searchParams.set("model", this.model);
    const protocols = ["realtime", ...(this.key ? [`openai-insecure-api-key.${this.key}`] : [])];
    let socket;
    try {
      socket = new WebSocket(url, protocols);
    } catch {
      return this.change("locked", { problem: "wrongKey" }); // with characters that no subprotocol can have
    }
    this.socket = socket;
    let problem = "refused";
    const timer = setTimeout(() => this.lost(generation, "unreachable"), 1000 * OPENING_SECONDS);
    socket.onmessage = ({ data }) => {
      if (generation !== this.generation) return;
      const event = JSON.parse(data);
      if (event.type === "session.created") {
        clearTimeout(timer);
        this.opened = performance.now();
        problem = "lost";
        this.change("online");
      } else if (event.type === "error" && event.error?.code === "server_busy") {
        problem = "busy";
      } else if (event.type === "error" && event.error?.code === "session_expired") {
        problem = "ended"; // nobody said anything for long: connecting again by itself would never end
      }
      this.dispatchEvent(new CustomEvent("event", { detail: event }));
    };
    socket.onclose = ({ code, reason }) => {
      clearTimeout(timer);
      if (generation !== this.generation) return;
      if (problem === "ended") {
        this.drop();
        return this.change("ended", { reason });
      }
      this.lost(generation, code === 1013 ? "busy" : problem);
    };
  }

  lost(generation, problem) {
    if (generation !== this.generation) return;
    if (performance.now() - this.opened > 1000 * STABLE_SECONDS) this.attempts = 0;
    this.opened = NaN;
    this.retry(this.drop(), problem);
  }

  /** Waits, longer each time and not in step with other pages, and connects again. */
  retry(generation, problem, atLeast = 0) {
    if (generation !== this.generation) return;
    const wait = Math.min(LONGEST_WAIT, FIRST_WAIT * 2 ** this.attempts++) * (0.75 + 0.5 * Math.random());
    const seconds = Math.max(wait, Math.min(atLeast, 60));
    this.change("waiting", { problem });
    this.timer = setTimeout(() => this.connect(), 1000 * seconds);
  }

  drop() {
    clearTimeout(this.timer);
    this.socket?.close();
    this.socket = null;
    return ++this.generation;
  }

  /** Sends an event. Returns false where there is no connection. */
  send(event) {
    if (this.state !== "online") return false;
    this.socket.send(JSON.stringify(event));
    return true;
  }

  /** Sends sound of the microphone, as base64; drops it where the line is far behind. */
  sendSound(audio) {
    return this.state === "online" && this.socket.bufferedAmount < MAX_BACKLOG
      ? this.send({ type: "input_audio_buffer.append", audio })
      : false;
  }
}
