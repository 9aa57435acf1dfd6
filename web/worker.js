// The worker: fetches or reads the model's files piece by piece straight into the program's memory, where the
// library uses them in place, and lets the model talk a few milliseconds at a time, so that Stop is heard.
'use strict';
const STEP_MS = 30;         // how long the model works before messages are looked at again
const KINDS = {0: 'answer', 1: 'thinking', 2: 'call'};     // QWEN3_TEXT_*
let program = null;         // the compiled library; a new one for each model, so that nothing of the last one stays
let job = 0;                // what is being loaded or said; whatever belongs to an older number has been cancelled
let loads = 0;              // how often loading began
let download = null;        // the AbortController of what is being loaded
let usable = false;         // a model is loaded

const post = (type, more) => postMessage({type, ...more});
const pause = () => new Promise(go => { const c = new MessageChannel(); c.port1.onmessage = go; c.port2.postMessage(0); });
class Cancelled extends Error {}

// On an isolated page memory may be shared between threads; on others there is one thread.
const THREADS = self.crossOriginIsolated ? Math.max(1, navigator.hardwareConcurrency || 1) : 1;

// Does relaxed SIMD multiply and add at once here? f(a, b, c) = lane 0 of f32x4.relaxed_madd(a, b, c). If it does, the
// program that uses it gives the bits of native ones.
function fuses() {
  const lane = i => [0x20, i, 0xfd, 0x13];              // local.get i, f32x4.splat
  const code = [0, ...lane(0), ...lane(1), ...lane(2), 0xfd, 0x85, 2, 0xfd, 0x1f, 0, 0x0b];
  const bytes = [0, 0x61, 0x73, 0x6d, 1, 0, 0, 0, 1, 8, 1, 0x60, 3, 0x7d, 0x7d, 0x7d, 1, 0x7d, 3, 2, 1, 0,
    7, 5, 1, 1, 0x66, 0, 0, 10, code.length + 2, 1, code.length, ...code];
  const module = new Uint8Array(bytes), a = 1 + 2 ** -12;
  return WebAssembly.validate(module) &&
    new WebAssembly.Instance(new WebAssembly.Module(module)).exports.f(a, a, -1 - 2 ** -11) === 2 ** -24;
}
const SCRIPT = `qwen3${THREADS > 1 ? '_threads' : ''}${fuses() ? '_relaxed' : ''}.js`;
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
const MAYBE = ['generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'vocab.json', 'merges.txt',
  'added_tokens.json', 'special_tokens_map.json', 'modules.json', 'system.txt'];
const wanted = name => /\.(gguf|safetensors|index\.json)$/.test(name) || name === 'config.json' || MAYBE.includes(name);

// Of {file, path}: those of one model. Its directory may have others below (1_Pooling/config.json): the outermost
// counts. Several GGUF files are the parts of one.
function chosen(files) {
  const depth = f => f.path.split('/').length, found = new Map();
  const whole = files.filter(f => /\.gguf$/i.test(f.path) && !/-\d{5}-of-\d{5}\./.test(f.path));
  const twice = (one, other) => { throw new Error(`${one.path} and ${other.path} are two models: open one of them`); };
  for (const f of files.filter(f => wanted(f.file.name)).sort((a, b) => depth(a) - depth(b))) {
    const other = found.get(f.file.name);
    if (!other) found.set(f.file.name, f);
    else if (depth(other) === depth(f)) twice(other, f);
  }
  if (whole.length > 1) twice(...whole);
  if (!found.size) throw new Error(`${files[0].path}: neither a GGUF file nor part of a Hugging Face directory`);
  return [...found.values()].map(({file}) => ({name: file.name, size: file.size, stream: file.stream()}));
}

async function openUrl(url, name, optional) {
  let reply;
  try { reply = await fetch(url, {signal: download.signal}); } catch (e) {
    if (download.signal.aborted) throw new Cancelled();
    throw new Error(`${url}: cannot be fetched: no server answers, or it does not let other pages read (CORS)`);
  }
  if (!reply.ok && optional) return null;
  if (!reply.ok) throw new Error(`${url}: the server says ${reply.status} ${reply.statusText}`);
  const html = /^text\/html/.test(reply.headers.get('content-type'));
  if (html && optional) return null;
  if (html) throw new Error(`${url}: this is a web page, not a model's file`);
  const plain = !reply.headers.get('content-encoding'), size = Number(reply.headers.get('content-length'));
  return {name, size: plain && size ? size : null, stream: reply.body};
}

// A GGUF file, with its other parts if it is one of several, or a directory; a page of Hugging Face's means the files
// behind it.
async function openAddress(given) {
  const url = new URL(given, self.location.href).href
    .replace(/^(https:\/\/huggingface\.co\/[^/]+\/[^/]+)\/?$/, '$1/resolve/main/')
    .replace(/^(https:\/\/huggingface\.co\/[^/]+\/[^/]+\/)(blob|tree)\//, '$1resolve/');
  const name = decodeURIComponent(url.replace(/[?#].*/, '').split('/').pop());
  if (/\.gguf$/i.test(name)) {
    const parts = /-00001-of-(\d{5})\./.exec(name), found = [];
    const nth = (text, i) => text.replace('-00001-of-', `-${String(i).padStart(5, '0')}-of-`);
    for (let i = 1; i <= (parts ? Number(parts[1]) : 1); i++) found.push(await openUrl(nth(url, i), nth(name, i)));
    return found;
  }
  const base = url.endsWith('/') ? url : url + '/';
  const found = [await openUrl(base + 'config.json', 'config.json')];
  const index = await openUrl(base + 'model.safetensors.index.json', 'model.safetensors.index.json', true);
  let weights = ['model.safetensors'];
  if (index) {
    const bytes = await new Response(index.stream).arrayBuffer();
    weights = [...new Set(Object.values(JSON.parse(new TextDecoder().decode(bytes)).weight_map))];
    found.push({name: index.name, size: bytes.byteLength, stream: new Response(bytes).body});
  }
  for (const name of MAYBE) found.push(await openUrl(base + name, name, true));
  for (const name of weights) found.push(await openUrl(base + name, name));
  return found.filter(Boolean);
}

// A stream's reader, and a function that reads on: into one buffer again and again, where the browser can.
function pieces(stream) {
  let buffer = new ArrayBuffer(1 << 20), reader;
  try { reader = stream.getReader({mode: 'byob'}); } catch (e) { return [reader = stream.getReader(), () => reader.read()]; }
  return [reader, async () => {
    const piece = await reader.read(new Uint8Array(buffer));
    if (piece.value) buffer = piece.value.buffer;
    return piece;
  }];
}

// One file into memory that the program owns, piece by piece.
async function readFile(file, mine, progress) {
  const [reader, next] = pieces(file.stream);
  const index = withText(file.name, at => program._web_file(at)), fail = () => {
    throw new Error(`${file.name}: does not fit into the memory that a browser gives to one page (at most 4 GB)`);
  };
  let room = file.size ?? 1 << 20, used = 0;
  if (index < 0 || !program._web_file_room(index, room)) fail();
  for (;;) {
    const {done, value} = await next().catch(e => {
      if (mine !== job) throw new Cancelled();
      throw new Error(`${file.name}: broke off after ${megabytes(used)} (${e.message})`);
    });
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
      const of = total ? ` of ${megabytes(total)}` : '';
      post('progress', {done: total && done / total, what: `${file.name}: ${megabytes(done)}${of}`});
    });
}

// ---- what the page asks for ---------------------------------------------------------------------------------
async function load({source}) {
  const mine = ++job;
  if (download) download.abort();
  download = new AbortController();
  post('progress', {done: null, what: 'looking for the files …'});
  const files = source.files ? chosen(source.files) : await openAddress(source.url);     // or fail: the last model stays
  if (mine !== job) throw new Cancelled();
  usable = false;
  program = null;           // its memory goes
  const fresh = await Qwen3({mainScriptUrlOrBlob: SCRIPT});
  if (mine !== job) throw new Cancelled();
  program = fresh;
  await readAll(files, mine);
  if (program._web_load(THREADS)) throw new Error(text(program._web_error()));
  usable = true;
  const threads = THREADS === 1 ? '1 thread' : `${THREADS} threads`, memory = megabytes(program.HEAPU8.length);
  const about = `${text(program._web_about())}, ${threads}, ${memory} of memory`;
  post('loaded', {about, system: text(program._web_system())});
}

async function say({text: said, system, think}) {
  const mine = ++job, started = performance.now(), model = program;     // which another may replace meanwhile
  const reason = () => new Error(model.UTF8ToString(model._web_error()));
  if (withText(said, at => withText(system, sys => model._web_say(at, sys, think ? 1 : 0)))) throw reason();
  let state = 1;
  while (state === 1 && mine === job) {
    state = model._web_step(STEP_MS);
    await pause();
  }
  const n = model._web_finish(), seconds = (performance.now() - started) / 1000;
  if (state < 0) throw reason();
  post('done', {note: `${n} tokens, ${(n / seconds).toFixed(1)} a second` + (mine === job ? '' : ', stopped')});
}

// Called by the program (qwen3_web.c) with whole characters.
self.onText = (kind, piece) => post('text', {kind: KINDS[kind], text: piece});

const handle = {
  load, say,
  async cancel() { job++; download.abort(); },
  async stop() { job++; },
  async reset() { if (program) program._web_reset(); },
};
onmessage = async ({data}) => {
  const newest = data.type === 'load' ? ++loads : loads;
  try {
    await handle[data.type](data);
  } catch (e) {
    if (newest !== loads) return;       // what failed has been given up for another load
    const why = e instanceof Cancelled ? 'Loading was cancelled.' : e.message;
    post('error', {text: why, loading: data.type === 'load', usable});
  }
};
