// Times llama.cpp (npm package node-llama-cpp) on a GGUF model: prefill and batch-1 decode.
//
//   node tools/bench/llama_cpp_bench.mjs MODEL.gguf --package DIR --threads 1,2 --prompt 512
//        --generate 128 --runs 5
//
// Prints one JSON object with every run, so that the caller can pair runs and take medians.
// Run by tools/bench/compare_llama_cpp.py; DIR holds node_modules/node-llama-cpp.
import {createRequire} from "node:module";
import path from "node:path";
import {pathToFileURL} from "node:url";
import {parseArgs} from "node:util";

const {values, positionals} = parseArgs({
  allowPositionals: true,
  options: {
    package: {type: "string", default: "."},
    threads: {type: "string", default: "1,2"},
    prompt: {type: "string", default: "512"},
    generate: {type: "string", default: "128"},
    runs: {type: "string", default: "5"},
  },
});
const require = createRequire(pathToFileURL(path.resolve(values.package, "package.json")));
const {getLlama, LlamaLogLevel} = await import(
  pathToFileURL(require.resolve("node-llama-cpp")).href);

const promptTokens = Number(values.prompt);
const generateTokens = Number(values.generate);
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: positionals[0]});
// Token ids of no particular meaning, the same in every run: speed does not depend on them.
const prompt = Array.from({length: promptTokens}, (_, i) => 1000 + ((i * 7919) % 40000));

async function timeOnce(threads) {
  const context = await model.createContext({
    contextSize: promptTokens + generateTokens + 16, batchSize: 512, threads, flashAttention: true,
  });
  const sequence = context.getSequence();
  const begin = performance.now();
  await sequence.evaluateWithoutGeneratingNewTokens(prompt);
  const prefilled = performance.now();
  await sequence.clearHistory();
  await sequence.evaluateWithoutGeneratingNewTokens(prompt.slice(0, 16));
  let count = 0;
  let first = 0;
  for await (const _ of sequence.evaluate([1], {temperature: 0})) {
    if (count === 0) first = performance.now();
    count += 1;
    if (count === generateTokens) break;
  }
  const end = performance.now();
  await context.dispose();
  return {
    threads,
    prefill_tokens_per_second: promptTokens / ((prefilled - begin) / 1000),
    decode_tokens_per_second: (generateTokens - 1) / ((end - first) / 1000),
  };
}

const runs = [];
for (let run = 0; run < Number(values.runs); run++) {
  for (const threads of values.threads.split(",").map(Number)) runs.push(await timeOnce(threads));
}
console.log(JSON.stringify({engine: "llama.cpp", systemInfo: llama.systemInfo, runs}));
process.exit(0);
