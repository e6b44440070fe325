"""The chat template: plain strings render as the released model was trained, content lists place speech and pictures.

A message's `content` is a string, or a list of `{"type": "text", "text": ...}`, `{"type": "audio"}` and
`{"type": "image"}` items. Speech or a picture stands two newlines away from its neighbours, as in training; a text
that brings its own newline at that border gets no more. `open_thinking=True` leaves the answer's think block open.
"""

CHAT_TEMPLATE = r"""
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is not mapping and content is iterable -%}
        {%- set state = namespace(text='', after_media=false) -%}
        {%- for item in content -%}
            {%- if item.type == 'text' -%}
                {%- set piece = item.text -%}
            {%- elif item.type == 'audio' -%}
                {%- set piece = '<|audio_pad|>' -%}
            {%- elif item.type in ['image', 'image_url'] -%}
                {%- set piece = '<|image_pad|>' -%}
            {%- else -%}
                {{- raise_exception('Content type ' ~ item.type ~ ' is not supported: use text, audio or image.') -}}
            {%- endif -%}
            {%- if piece -%}
                {%- set is_media = item.type != 'text' -%}
                {%- if state.text and (is_media or state.after_media) -%}
                    {%- if not (state.text.endswith('\n') or piece.startswith('\n')) -%}
                        {%- set state.text = state.text + '\n\n' -%}
                    {%- endif -%}
                {%- endif -%}
                {%- set state.text = state.text + piece -%}
                {%- set state.after_media = is_media -%}
            {%- endif -%}
        {%- endfor -%}
        {{- state.text -}}
    {%- endif -%}
{%- endmacro -%}

{%- set system = render(messages[0].content) if messages[0].role == 'system' else none -%}
{%- if tools -%}
    {{- '<|im_start|>system\n' -}}
    {%- if system is not none -%}
        {{- system + '\n\n' -}}
    {%- endif -%}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' -}}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' -}}
    {%- for tool in tools -%}
        {{- '\n' + tool | tojson -}}
    {%- endfor -%}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within ' -}}
    {{- '<tool_call></tool_call> XML tags:\n<tool_call>\n' -}}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' -}}
{%- elif system is not none -%}
    {{- '<|im_start|>system\n' + system + '<|im_end|>\n' -}}
{%- endif -%}

{%- for message in messages -%}
    {%- set content = render(message.content) -%}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' -}}
    {%- elif message.role == 'assistant' -%}
        {%- set thinking = '' -%}
        {%- if message.reasoning_content is string -%}
            {%- set thinking = message.reasoning_content -%}
        {%- elif '</think>' in content -%}
            {%- set thinking = content.split('</think>')[0].rstrip('\n').split('<think>')[-1] -%}
            {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\n<think>\n' + thinking.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') -}}
        {%- for call in message.tool_calls or [] -%}
            {%- if content or not loop.first -%}
                {{- '\n' -}}
            {%- endif -%}
            {%- set call = call.function or call -%}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' -}}
            {{- (call.arguments if call.arguments is string else call.arguments | tojson) + '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or loop.previtem.role != 'tool' -%}
            {{- '<|im_start|>user' -}}
        {%- endif -%}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' -}}
        {%- if loop.last or loop.nextitem.role != 'tool' -%}
            {{- '<|im_end|>\n' -}}
        {%- endif -%}
    {%- elif message.role != 'system' -%}
        {{- raise_exception('Role ' ~ message.role ~ ' is not known: use system, user, assistant or tool.') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n<think>\n' + ('' if open_thinking is true else '\n</think>\n\n') -}}
{%- endif -%}
""".strip()

__all__ = ["CHAT_TEMPLATE"]
