"""Runs the code of a Blender add-on in Blender as a module (bpy): ADDON URL PICTURE. Prints what it imported, or what it reported.

Blender's background mode has no main loop and no windows, so the add-on's work is called directly: its own function sends the
request, reads the answer and imports the file.
"""

import importlib.util
import json
import sys
import types

import bpy


def main() -> None:
    addon, url, picture, texture = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("addon", addon)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    bpy.ops.object.select_all(action="SELECT")
    bpy.ops.object.delete()
    timers = types.SimpleNamespace(register=lambda function: function())
    module.bpy = types.SimpleNamespace(app=types.SimpleNamespace(timers=timers), ops=bpy.ops, context=bpy.context)
    reported = []
    operator = types.SimpleNamespace(
        api_url=url, image_path=picture, prompt="", texture=texture == "texture", octree_resolution=128, num_inference_steps=20,
        guidance_scale=5.5, selected_mesh=None, selected_mesh_base64="", task_finished=False,
        report=lambda kind, text: reported.append([*kind, text]),
    )  # fmt: skip
    properties = types.SimpleNamespace(is_processing=True)
    context = types.SimpleNamespace(scene=types.SimpleNamespace(gen_3d_props=properties))
    module.Hunyuan3DOperator.generate_model(operator, context)
    meshes = [len(each.data.polygons) for each in bpy.context.scene.objects if each.type == "MESH"]
    sys.stdout.write(
        "RESULT " + json.dumps({"meshes": meshes, "reported": reported, "processing": properties.is_processing}) + "\n"
    )


main()
