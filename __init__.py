"""ComfyUI-Duet. The host and pytest both import this file, so the nodes and torch wait until they are asked for."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import DuetExtension

    return DuetExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
