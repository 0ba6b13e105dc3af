// What both pages know of the server: the key, and errors as it words them.

const KEY = "pagegraph.key";

/** The API key of this tab; it is not kept when the tab is closed. */
export const key = { get: () => sessionStorage.getItem(KEY) || "", set: (value) => sessionStorage.setItem(KEY, value) };

/** `fetch` with the key. Throws an Error with the server's message and, as `status`, its code. */
export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (!/^[\x20-\x7e]*$/.test(key.get())) throw Object.assign(new Error("The API key holds characters that cannot be sent."), { status: 401 });
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const answer = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("The server cannot be reached.");
  });
  if (answer.ok) return answer;
  let message = `${answer.status} ${answer.statusText}`;
  try {
    message = (await answer.json()).error.message || message;
  } catch { /* no JSON: a proxy's page */ }
  throw Object.assign(new Error(message), { status: answer.status });
}

/** An element with properties and children. */
export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}
