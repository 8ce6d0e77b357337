// Collects the licences of all packages that are in the bundle, as their terms ask.
import { readFileSync, readdirSync, writeFileSync } from "node:fs";

const [meta, target] = process.argv.slice(2);
const inputs = Object.values(JSON.parse(readFileSync(meta, "utf8")).outputs)[0].inputs;
const names = new Set();
for (const [path, { bytesInOutput }] of Object.entries(inputs)) {
  if (!bytesInOutput || !path.includes("node_modules/")) continue;
  const parts = path.split("node_modules/").at(-1).split("/");
  names.add(parts[0].startsWith("@") ? `${parts[0]}/${parts[1]}` : parts[0]);
}
const packages = new Map(); // text of a licence -> packages under it
for (const name of [...names].sort()) {
  const folder = `node_modules/${name}`;
  const { version, license } = JSON.parse(readFileSync(`${folder}/package.json`, "utf8"));
  const text = readFileSync(`${folder}/${readdirSync(folder).filter((file) => file.startsWith("LICENSE")).sort()[0]}`, "utf8").trim();
  packages.set(text, [...(packages.get(text) ?? []), `${name} ${version} (${license})`]);
}
const lines = ["plot.min.js is a bundle of these packages of the npm registry, made by `make vendor`. Their licences:", ""];
for (const [text, members] of packages) lines.push("=".repeat(80), ...members, "-".repeat(80), text, "");
writeFileSync(target, `${lines.join("\n")}\n`);
