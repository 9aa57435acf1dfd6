// The worker: fetches or reads the model's files piece by piece straight into the program's memory, where the
// library uses them in place, and lets the model talk a few milliseconds at a time, so that Stop is heard.
'use strict';
const STEP_MS = 30;         // how long the model works before messages are looked at again
const KINDS = {0: 'answer', 1: 'thinking', 2: 'call'};     // QWEN3_TEXT_*
let program = null;         // the compiled library; a new one for each model, so that nothing of the last one stays
let job = 0;                // what is being loaded or said; whatever belongs to an older number has been cancelled
let usable = false;         // a model is loaded

const post = (type, more) => postMessage({type, ...more});
const pause = () => new Promise(go => { const c = new MessageChannel(); c.port1.onmessage = go; c.port2.postMessage(0); });
class Cancelled extends Error {}

// On an isolated page memory may be shared between threads; on others there is one thread.
const THREADS = self.crossOriginIsolated ? Math.max(1, navigator.hardwareConcurrency || 1) : 1;
const SCRIPT = THREADS > 1 ? 'qwen3_threads.js' : 'qwen3.js';
importScripts(SCRIPT);      // defines Qwen3(settings), which compiles the program

const text = pointer => program.UTF8ToString(pointer);
function withText(string, use) {
  const size = program.lengthBytesUTF8(string) + 1, at = program._malloc(size);
  if (!at) throw new Error('there is no memory left');
  program.stringToUTF8(string, at, size);
  try { return use(at); } finally { program._free(at); }
}
const megabytes = n => (n / 1e6).toFixed(n < 1e8 ? 1 : 0) + ' MB';

// ---- files: {name, size (or null if not known), stream} -----------------------------------------------------
const WANTED = /^(.*\.(gguf|safetensors)|(config|generation_config|tokenizer|tokenizer_config|vocab|modules|added_tokens|special_tokens_map|.*\.index)\.json|merges\.txt|system\.txt)$/;

async function openUrl(url, name, optional) {
  let reply;
  try { reply = await fetch(url); } catch (e) { throw new Error(`${url}: cannot be fetched (${e.message})`); }
  if (!reply.ok && optional) return null;
  if (!reply.ok) throw new Error(`${url}: the server says ${reply.status} ${reply.statusText}`);
  const plain = !reply.headers.get('content-encoding'), size = Number(reply.headers.get('content-length'));
  return {name, size: plain && size ? size : null, stream: reply.body};
}

async function openAll(source) {
  if (source.files) {
    const wanted = source.files.filter(f => WANTED.test(f.name));
    if (!wanted.length) throw new Error(`${source.files[0].name}: neither a GGUF file nor part of a Hugging Face directory`);
    return wanted.map(f => ({name: f.name, size: f.size, stream: f.stream()}));
  }
  const url = new URL(source.url, self.location.href).href, name = decodeURIComponent(url.replace(/[?#].*/, '').split('/').pop());
  if (/\.gguf$/i.test(name)) return [await openUrl(url, name)];
  const base = url.endsWith('/') ? url : url + '/';
  const maybe = ['generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'vocab.json', 'merges.txt', 'system.txt'];
  const found = [await openUrl(base + 'config.json', 'config.json')];
  const index = await openUrl(base + 'model.safetensors.index.json', 'model.safetensors.index.json', true);
  let weights = ['model.safetensors'];
  if (index) {
    const bytes = await new Response(index.stream).arrayBuffer();
    weights = [...new Set(Object.values(JSON.parse(new TextDecoder().decode(bytes)).weight_map))];
    found.push({name: index.name, size: bytes.byteLength, stream: new Response(bytes).body});
  }
  for (const name of maybe) found.push(await openUrl(base + name, name, true));
  for (const name of weights) found.push(await openUrl(base + name, name));
  return found.filter(Boolean);
}

// One file into memory that the program owns.
async function readFile(file, mine, progress) {
  const reader = file.stream.getReader();
  const index = withText(file.name, at => program._web_file(at)), fail = () => {
    throw new Error(`${file.name}: does not fit into the memory that a browser gives to one page (at most 4 GB)`);
  };
  let room = file.size ?? 1 << 20, used = 0;
  if (index < 0 || !program._web_file_room(index, room)) fail();
  for (;;) {
    const {done, value} = await reader.read();
    if (mine !== job) { reader.cancel(); throw new Cancelled(); }
    if (done) break;
    if (used + value.length > room) {
      room = Math.max(2 * room, used + value.length);
      if (!program._web_file_room(index, room)) fail();
    }
    program.HEAPU8.set(value, program._web_file_data(index) + used);
    used += value.length;
    progress(value.length);
  }
  program._web_file_end(index, used);
}

async function readAll(files, mine) {
  const total = files.every(f => f.size !== null) ? files.reduce((sum, f) => sum + f.size, 0) : null;
  let done = 0, said = 0;
  for (const file of files)
    await readFile(file, mine, n => {
      done += n;
      if (performance.now() - said < 100) return;
      said = performance.now();
      post('progress', {done: total ? done / total : 0.5, what: `${file.name}: ${megabytes(done)}` + (total ? ` of ${megabytes(total)}` : '')});
    });
}

// ---- what the page asks for ---------------------------------------------------------------------------------
async function load({source}) {
  const mine = ++job;
  usable = false;
  program = null;           // the memory of the last model goes
  const fresh = await Qwen3({mainScriptUrlOrBlob: SCRIPT});
  if (mine !== job) return;
  program = fresh;
  post('progress', {done: 0, what: 'looking for the files …'});
  await readAll(await openAll(source), mine);
  if (program._web_load(THREADS)) throw new Error(text(program._web_error()));
  usable = true;
  post('loaded', {about: text(program._web_about()), system: text(program._web_system())});
}

async function say({text: said, system, think}) {
  const mine = ++job, started = performance.now();
  if (withText(said, at => withText(system, sys => program._web_say(at, sys, think ? 1 : 0)))) throw new Error(text(program._web_error()));
  let state = 1;
  while (state === 1 && mine === job) {
    state = program._web_step(STEP_MS);
    await pause();
  }
  const n = program._web_finish(), seconds = (performance.now() - started) / 1000;
  if (state < 0) throw new Error(text(program._web_error()));
  post('done', {note: `${n} tokens, ${(n / seconds).toFixed(1)} a second` + (mine === job ? '' : ', stopped')});
}

// Called by the program (qwen3_web.c) with whole characters.
self.onText = (kind, piece) => post('text', {kind: KINDS[kind], text: piece});

const handle = {
  load, say,
  async cancel() { job++; },
  async stop() { job++; },
  async reset() { if (program) program._web_reset(); },
};
onmessage = async ({data}) => {
  try {
    await handle[data.type](data);
  } catch (e) {
    if (data.type === 'load') usable = false;
    post('error', {text: e instanceof Cancelled ? 'Loading was cancelled.' : e.message, usable});
  }
};
