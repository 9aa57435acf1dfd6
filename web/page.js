// The page: what is seen and pressed. The model runs in a worker (worker.js), so nothing here ever waits.
'use strict';
const $ = id => document.getElementById(id);
const worker = new Worker('worker.js');
const send = (type, more) => worker.postMessage({type, ...more});
let answer = null;          // the turn that is being written: {turn, text, thinking}
let loading = true;

function addTurn(kind, who, text) {
  const turn = document.createElement('div'), name = document.createElement('b'), body = document.createElement('span');
  turn.className = 'turn ' + kind;
  name.textContent = who;
  body.textContent = text;
  turn.append(name, body);
  $('log').append(turn);
  turn.scrollIntoView({block: 'end'});
  return {turn, text: body, thinking: null};
}

function addThinking(to) {
  const fold = document.createElement('details'), title = document.createElement('summary');
  to.thinking = document.createElement('div');
  fold.className = 'thinking';
  title.textContent = 'Thinking';
  fold.append(title, to.thinking);
  to.turn.insertBefore(fold, to.text);
}

function setBusy(busy) {
  $('send').disabled = busy || loading;
  $('stop').disabled = !busy;
  $('reset').disabled = busy;
  $('log').setAttribute('aria-busy', busy);
}

function load(source) {
  loading = true;
  $('loading').hidden = false;
  $('progress').removeAttribute('value');
  $('send').disabled = true;
  send('load', {source});
}

function say() {
  const text = $('message').value.trim();
  if (!text || $('send').disabled) return;
  $('message').value = '';
  addTurn('user', 'You', text);
  answer = addTurn('model', 'Model', '');
  setBusy(true);
  send('say', {text, system: $('system').value, think: $('think').checked});
}

function reset() {
  $('log').replaceChildren();
  $('state').textContent = '';
  send('reset');
  $('message').focus();
}

const on = {
  progress({done, what}) {
    if (done === null) $('progress').removeAttribute('value');      // nobody knows how much there is
    else $('progress').value = done;
    $('state').textContent = what;
  },
  loaded({about, system}) {
    loading = false;
    $('loading').hidden = true;
    $('model').textContent = about;
    $('system').value = system;
    reset();
    setBusy(false);
  },
  text({kind, text}) {
    if (kind === 'thinking' && !answer.thinking) addThinking(answer);
    (kind === 'thinking' ? answer.thinking : answer.text).append(text);
    $('log').scrollTop = $('log').scrollHeight;
  },
  done({note}) {
    answer = null;
    $('state').textContent = note;
    setBusy(false);
  },
  error({text, loading: itWasLoading, usable}) {
    if (itWasLoading) loading = false;
    $('loading').hidden = !loading;
    addTurn('bad', 'This did not work', text).turn.setAttribute('role', 'alert');
    $('state').textContent = '';
    answer = null;
    setBusy(false);
    $('send').disabled = loading || !usable;
    if (!usable && !loading) $('model').textContent = 'No model';
  },
};
worker.onmessage = ({data}) => on[data.type](data);
worker.onerror = event => on.error({text: 'The model program stopped: ' + event.message, loading: true});

// Dropped folders: every file below them, with its path
async function filesOf(items) {
  const found = [];
  async function walk(entry) {
    if (entry.isFile) found.push({path: entry.fullPath.slice(1), file: await new Promise((ok, no) => entry.file(ok, no))});
    else {
      const reader = entry.createReader();
      for (;;) {
        const some = await new Promise((ok, no) => reader.readEntries(ok, no));
        if (!some.length) return;
        for (const inner of some) await walk(inner);
      }
    }
  }
  for (const entry of [...items].map(item => item.webkitGetAsEntry()).filter(Boolean)) await walk(entry);
  return found;
}

$('form').onsubmit = event => { event.preventDefault(); say(); };
$('message').onkeydown = event => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); say(); }
};
document.onkeydown = event => { if (event.key === 'Escape' && !$('stop').disabled) send('stop'); };
$('stop').onclick = () => send('stop');
$('cancel').onclick = () => send('cancel');
$('reset').onclick = reset;
$('files').onchange = $('folder').onchange = event => {
  const files = [...event.target.files].map(file => ({path: file.webkitRelativePath || file.name, file}));
  if (files.length) load({files});
  event.target.value = '';
};
$('demo').onclick = () => load({url: 'demo/'});
$('fetch').onclick = () => { if ($('url').value) load({url: $('url').value}); };
document.ondragover = event => { event.preventDefault(); document.body.classList.add('drop'); };
document.ondragleave = () => document.body.classList.remove('drop');
document.ondrop = async event => {
  event.preventDefault();
  document.body.classList.remove('drop');
  const files = await filesOf(event.dataTransfer.items);
  if (files.length) load({files});
};
load({url: 'demo/'});
