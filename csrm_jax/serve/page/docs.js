'use strict';
// The endpoints as /openapi.json describes them, with their examples.

function element(tag, text, parent) {
  const node = document.createElement(tag);
  node.textContent = text;
  parent.append(node);
  return node;
}

function media(part) {
  return part && part.content ? part.content['application/json'] || {} : {};
}

async function show() {
  const docs = document.getElementById('docs');
  const response = await fetch('/openapi.json');
  if (!response.ok) {
    element('p', 'A token is needed: send "Authorization: Bearer TOKEN" to /openapi.json.', docs);
    return;
  }
  const { paths } = await response.json();
  for (const [path, methods] of Object.entries(paths)) {
    for (const [method, about] of Object.entries(methods)) {
      element('h2', `${method.toUpperCase()} ${path}`, docs);
      element('p', `${about.summary}. ${about.description || ''}`, docs);
      for (const [name, { value }] of Object.entries(media(about.requestBody).examples || {})) {
        element('h3', name, docs);
        element('pre', JSON.stringify(value, null, 1), docs);
      }
      const { example } = media((about.responses || {})['200']);
      if (example) {
        element('h3', 'Answer', docs);
        element('pre', JSON.stringify(example, null, 1), docs);
      }
    }
  }
}

show();
