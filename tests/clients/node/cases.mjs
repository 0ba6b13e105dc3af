// The cases of a script for Node: as scripts/cases.py, which says what the environment tells a script.

import { readFileSync, writeFileSync } from "node:fs";

export const API_URL = `${process.env.CLIENTS_BASE_URL.replace(/\/+$/, "")}/v1`;
export const MODEL = process.env.CLIENTS_MODEL;
export const KEY = "none";
export const QUESTION = "What is the capital of France?";
export const ANSWER = "Paris";
export const CITIES = ["Paris", "Rome", "Oslo"];

const cases = [];
const notes = [];

// Registers an async function as a case of a feature. It passes unless it throws.
export function testCase(feature, name, run) {
  cases.push({ feature, name, run });
}

// A word on this client for the table.
export function note(text) {
  notes.push(text);
}

export function check(holds, ...shown) {
  if (!holds) throw new Error(`check failed: ${JSON.stringify(shown)}`);
}

function version(name) {
  return JSON.parse(readFileSync(new URL(`node_modules/${name}/package.json`, import.meta.url))).version;
}

// Runs the cases named on the command line, or all; `packages` are those whose versions are told.
export async function main(...packages) {
  const asked = new Set(process.argv.slice(2));
  const found = [];
  for (const { feature, name, run } of cases) {
    if (asked.size && !asked.has(name)) continue;
    console.error(`-- ${feature}: ${name}`);
    let error = "";
    try {
      await run();
    } catch (thrown) {
      console.error(thrown);
      error = String(thrown).split(/\s+/).join(" ").slice(0, 300);
    }
    found.push({ feature, name, ok: !error, error });
  }
  const versions = Object.fromEntries(packages.map((name) => [name, version(name)]));
  const text = JSON.stringify({ versions, cases: found, notes }, null, 1);
  if (process.env.CLIENTS_REPORT) writeFileSync(process.env.CLIENTS_REPORT, text);
  else console.log(text);
  process.exit(found.every(({ ok }) => ok) ? 0 : 1);
}
