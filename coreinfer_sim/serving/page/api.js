// The server's interfaces.

let key = sessionStorage.getItem("coreinfer-key") || "";

export function apiKey() {
  return key;
}

export function setApiKey(value) {
  key = value;
  sessionStorage.setItem("coreinfer-key", value);
}

async function request(path, body, signal) {
  const headers = {...(key ? {Authorization: `Bearer ${key}`} : {}), ...(body ? {"Content-Type": "application/json"} : {})};
  let answer;
  try {
    answer = await fetch(path, {method: body ? "POST" : "GET", headers, signal, ...(body ? {body: JSON.stringify(body)} : {})});
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server cannot be reached; is it still running?");
  }
  if (!answer.ok) throw new Error(await answer.json().then(each => each.error.message, () => `The server says ${answer.status}.`));
  return answer;
}

const asked = async (path, body, signal) => (await request(path, body, signal)).json();

export const health = () => asked("/health");
export const models = () => asked("/v1/models");
export const map = () => asked("/api/map");
export const lookup = body => asked("/api/lookup", body);
export const topicNeurons = topic => asked(`/api/topics/${topic}/neurons`);
export const neuronsRead = id => asked(`/api/neurons/${encodeURIComponent(id)}`);

/**
 * Ask for an answer that streams.
 *
 * @param body of the request
 * @param chat whether it is a conversation, rather than a text to continue
 * @param on takes {id}, {text} as they come
 * @param signal breaks the answer off
 * @returns {finish, facts, timings, usage}
 */
export async function stream(body, chat, on, signal) {
  const path = chat ? "/v1/chat/completions" : "/v1/completions";
  const answer = await request(path, {...body, stream: true, stream_options: {include_usage: true}}, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  const found = {finish: null, facts: null, timings: null, usage: null};
  let rest = "", id = null;
  for (;;) {
    const {done, value} = await reader.read().catch(error => {
      throw error.name === "AbortError" ? error : new Error("The connection to the server broke off; is it still running?");
    });
    if (done) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") continue;
      const part = JSON.parse(data);
      if (part.error) throw new Error(part.error.message);
      if (id === null) on({id: (id = part.id)});
      for (const choice of part.choices) {
        const text = (choice.delta ? choice.delta.content : choice.text) || "";
        if (text) on({text});
        found.finish = choice.finish_reason || found.finish;
      }
      found.facts = part.coreinfer || found.facts;
      found.timings = part.timings || found.timings;
      found.usage = part.usage || found.usage;
    }
  }
  if (found.finish === null) throw new Error("The server ended the answer early; its log says why.");
  return found;
}
